"""What a training step would compute, hold and send, predicted from lengths and configuration.

Nothing here runs in a training step. Groups are planned and packed by `layout`, as a run does it.
"""
