"""The live operations page: what a service does now, what it costs today, and whether all is well. It only reads.

`page` returns HTML, a style sheet and a small script, by path; an HTTP server calls it through the entry point
`polar_server.pages`. Every number comes from the ledger, by the functions that `polar usage`, `polar report`,
`polar budget show` and `polar receipt` use. Knows no web framework and no engine.
"""
