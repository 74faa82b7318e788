"""What observing and dropping cost and save. Models have random weights, for neither time nor memory depends on them.

    python -m study.bench prune                         # 576 image tokens on any machine, against bars
    python -m study.bench prune --shape llava-1.5-7b    # the paper's Table III on a GPU; no GPU has run it yet
    python -m study.bench growth                        # how cost grows with image tokens, batch and answer
    python -m study.bench latency --model pocket        # whole answers of a trained model under every strategy
    python -m study.bench observe                       # every layer observed: time and memory
    python -m study.bench memory                        # what 7B and 13B need, computed

The limit is the same model fed, natively, only as many tokens as a strategy keeps; the ideal is that model with the layers
before the first pruned one as they were. `realised` is (plain - strategy) / (plain - ideal).
"""
