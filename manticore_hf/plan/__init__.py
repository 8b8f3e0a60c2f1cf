"""What training a hybrid takes, from configurations alone: memory, operations, hours, and the engine that fits.

Imports run one way: amounts, ledger, kernels; then shrink, subject, step; then memory, engines, schedule; then tables
and run.
"""
