"""The stages of a run, in the order of the data: corpus, clusters, trainings, results.

Every function takes the :class:`~planearly.stages.folder.Run` and returns the folder of a finished
stage, building first what it needs; :mod:`planearly.stages.trained` puts them together per method.

Imports every package but study and studies.
"""
