"""Operations with a gradient written by hand, each beside its plain reference, on arrays alone.

What is there for one platform's compiler goes through the switch in `platform.py`.
"""
