"""The maths of the policy gradient: advantages and packing in numpy, losses in torch.

Imports nothing here, so that `dpsrl.algo.packing` stays free of torch.
"""
