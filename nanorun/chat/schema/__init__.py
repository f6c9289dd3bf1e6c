"""JSON Schemas of any origin: what a grammar can hold of one, and a check of the whole afterwards.

`holding` makes what llguidance takes and says what is left over, `checking` judges an answer by
the schema as it came, `following` does so at the end of a reply.
"""
