"""Devices, memory, FLOPs to hours, and the ledger. Lies below plan and stages, which both read
it."""
