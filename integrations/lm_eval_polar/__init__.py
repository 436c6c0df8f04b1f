"""PoLar models for lm-evaluation-harness: `import lm_eval_polar` registers the model `polar`.

The harness only knows models that were imported, and has no plug-ins; so `python -m lm_eval_polar` is its command with
this model among its own.
"""

from lm_eval_polar.model import PolarLM

__all__ = ["PolarLM"]
