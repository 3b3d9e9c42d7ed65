"""Work that maps shards to shards, and the executors that carry it out.

May import errors, files, processes and progress: a shard is a name, paths and numbers; what is done
to it is a function of the library that asks.
"""
