"""Array operations with hand-written gradients, each next to its plain reference implementation.

Workarounds for one platform's compiler go through the switch in `platform.py`.
"""
