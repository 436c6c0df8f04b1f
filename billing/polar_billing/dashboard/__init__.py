"""The live operations page: what a service does now, what it costs today, and whether all is well. It only reads.

`page` answers with HTML, a style sheet and a small script, by path; who speaks HTTP asks it, through the entry point
`polar_server.pages`. Every number is the answer to a question that the ledger is asked, by the functions that `polar
usage`, `polar report`, `polar budget show` and `polar receipt` use. Knows no web framework and no engine.
"""
