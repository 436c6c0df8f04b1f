"""`python -m lm_eval_polar --model polar …`: the command `lm_eval`, with the model `polar` registered."""

from lm_eval.__main__ import cli_evaluate

import lm_eval_polar  # noqa: F401  (registers)

cli_evaluate()
