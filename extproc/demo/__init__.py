"""The demo provider: a model provider for a machine without a provider key, started as a child by `extproc run`.

It stands where OpenAI or Anthropic would, behind Envoy, and speaks their wire formats. `answers` decides what is said,
`chat`, `responses`, `completions`, `embeddings` and `anthropic` put it into each API's words, `server` moves the bytes.
The surprising thing: nothing here is canned. Each answer is computed from the request, and its usage is counted with a
real tokenizer, so that budgets and ledgers on a laptop show the figures they would show in production.
"""
