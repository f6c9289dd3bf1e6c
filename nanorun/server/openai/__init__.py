"""OpenAI's API: chat and plain completions (`chat`, `completions`: the routes; `..._body`: what a
request means; `..._writer`: what goes back), `responses/`, and the list of models.
"""
