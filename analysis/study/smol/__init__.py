"""The laboratory `smol`: the pocket's eyes before SmolLM2-135M-Instruct, a language model of real words.

`parts` builds the model, `train` trains its projector and an adapter (LoRA) of the language model, `assemble` puts together
what `dyrate.load("smol")` reads. The language model itself (Apache-2.0, Hugging Face) is fetched, never committed.
"""
