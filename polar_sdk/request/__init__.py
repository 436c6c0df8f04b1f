"""The pipeline of a request: options and checks, prompt to tokens, admission, the answer and its usage record."""
