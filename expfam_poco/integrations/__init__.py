"""The optimizers inside other training loops: `transformers` (also with peft), `accelerate`, `lightning`.

Each module imports its package, this one imports none of them. `pip install 'expfam_poco[integrations]'`.
"""
