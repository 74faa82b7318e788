"""What the published methods' released code does to one prompt, as one slow loop over a LLaVA's own modules.

Written from the rules alone, on plain tensors: tokens really leave, positions are counted anew, nothing of `dyrate` is used.
Every function returns {layer: the hidden states that enter it after its drop, (token, width)}.
"""

import numpy as np
import torch


def embedded(model, ids, features):
    """Hidden states of a prompt whose image tokens are `features`, (token, width), however many; start and end of these."""
    image = ids == model.config.image_token_id
    start = int(image.nonzero()[0])
    text = model.get_input_embeddings()(ids)
    return torch.cat([text[:start], features, text[int(image.nonzero()[-1]) + 1 :]]), start, start + len(features)


def rotary(model, hidden):
    return model.get_decoder().rotary_emb(hidden[None], torch.arange(len(hidden))[None])


def causal(n):
    return torch.full((n, n), -torch.inf).triu(1)[None, None]


def through(layer, hidden, model):
    """One layer over the whole sequence: its output, and its attention weights (head, query, key)."""
    found = []
    handle = layer.self_attn.register_forward_hook(lambda m, a, out: found.append(out[1][0]))
    out = layer(hidden[None], attention_mask=causal(len(hidden)), position_embeddings=rotary(model, hidden))
    handle.remove()
    return (out[0] if isinstance(out, tuple) else out).reshape(hidden.shape), found[0]


def tower(model, pixels):
    """Hidden states of all tower layers (layer, 1 + patch, width), attention of each, and projections q, k of each."""
    vision = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    projected, handles = {}, []
    for i, layer in enumerate(vision.encoder.layers):
        for n in "qk":
            projection = getattr(layer.self_attn, f"{n}_proj")
            handles.append(projection.register_forward_hook(lambda m, a, out, k=(n, i): projected.__setitem__(k, out[0])))
    out = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    return [h[0] for h in out.hidden_states], [a[0] for a in out.attentions], projected


def pyramiddrop(model, ids, pixels, ratio=0.5):
    """Before layers L/4, L/2, 3L/4: rank by the last token's attention in that very layer, keep int(n * ratio ** stage)."""
    projector = model.model.multi_modal_projector
    hidden, start, end = embedded(model, ids, projector(tower(model, pixels)[0][-2][1:]))
    layers, found, n = model.get_decoder().layers, {}, end - start
    for i, layer in enumerate(layers):
        if i in (len(layers) // 4, len(layers) // 2, 3 * len(layers) // 4):
            stage = 1 + [len(layers) // 4, len(layers) // 2, 3 * len(layers) // 4].index(i)
            weights = layer.self_attn(
                layer.input_layernorm(hidden[None]), attention_mask=causal(len(hidden)), position_embeddings=rotary(model, hidden)
            )[1][0]
            best = weights[:, -1, start:end].mean(0).topk(int(n * ratio**stage)).indices.sort().values
            hidden = torch.cat([hidden[:start], hidden[start:end][best], hidden[end:]])
            end = start + len(best)
            found[i] = hidden
        hidden, _ = through(layer, hidden, model)
    return found


def sparsevlm(model, ids, pixels, tokens=(300, 200, 110)):
    """v1.5: layers 2, 6, 15 of 32 run whole; rank by their attention from raters chosen at the input; recycle; append."""
    projector = model.model.multi_modal_projector
    hidden, start, end = embedded(model, ids, projector(tower(model, pixels)[0][-2][1:]))
    layers, found, weights = model.get_decoder().layers, {}, None
    relevance = (hidden[start:end] @ hidden[end:].T).softmax(1).mean(0)
    raters = [j for j, r in enumerate(relevance) if r > relevance.mean()]
    stages = [round(len(layers) * i / 32) for i in (3, 7, 16)]
    for i, layer in enumerate(layers):
        if i in stages:
            rating = weights[:, [end + j for j in raters], start:end].mean(0).mean(0)
            order = sorted(range(end - start), key=lambda j: -float(rating[j]))
            n_best = min(tokens[stages.index(i)], end - start - 1)
            best, rest = sorted(order[:n_best]), order[n_best:]
            again = rest[: int(len(rest) * 0.3) + 1]
            merged = clusters(hidden[start:end][again], int(len(again) / 10) + 1)
            hidden = torch.cat([hidden[:start], hidden[start:end][best], merged, hidden[end:]])
            end = start + len(best) + len(merged)
            found[i] = hidden
        hidden, weights = through(layer, hidden, model)
    return found


def clusters(points, n):
    """Density peaks: density over the n nearest, distance to the next denser, clusters by the nearest centre; their means."""
    distance = torch.tensor([[float((a - b).norm()) for b in points] for a in points]) / points.shape[1] ** 0.5
    density = [float(torch.exp(-(row.sort().values[:n] ** 2).mean())) for row in distance]
    peak = []
    for j in range(len(points)):
        denser = [float(distance[j, k]) for k in range(len(points)) if density[k] > density[j]]
        peak.append(min(denser, default=float(distance.max())))
    score = [p * d for p, d in zip(peak, density, strict=True)]
    centres = sorted(range(len(points)), key=lambda j: -score[j])[:n]
    members = {c: [] for c in centres}
    for j in range(len(points)):
        members[j if j in centres else min(centres, key=lambda c: float(distance[j, c]))].append(j)
    return torch.stack([points[members[c]].mean(0) for c in centres])


def visionzip(model, ids, pixels, dominant=54, contextual=10):
    """[CLS] and dominant - 1 patches by its attention before the last layer; contextual targets plus the mean of theirs."""
    states, attention, projected = tower(model, pixels)
    used = len(attention) - 2
    heads = attention[used].shape[0]
    metric = projected["k", used].unflatten(-1, (heads, -1)).mean(1)  # (1 + patch, dim)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    best = attention[used][:, 0, 1:].sum(0).topk(dominant - 1).indices + 1
    first = [0, *sorted(best.tolist())]
    rest = [j for j in range(len(metric)) if j not in first]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    assigned = {t: [] for t in targets}
    for j in rest:
        if j not in targets:
            assigned[targets[int((metric[targets] @ metric[j]).argmax())]].append(j)
    features = states[-2]
    merged = [features[t] + (features[js].mean(0) if js else 0) for t, js in assigned.items()]
    sequence = torch.cat([features[first], torch.stack(merged)])
    return {0: embedded(model, ids, model.model.multi_modal_projector(sequence))[0]}


def prumerge(model, ids, pixels, plus=False, neighbours=32):
    """Outliers of the last layer's joint attention, each plus its neighbours' unnormalised sum; one token for the rest."""
    states, _, projected = tower(model, pixels)
    last = len(states) - 2
    query, key = projected["q", last], projected["k", last]
    cls = ((query @ key.T) * key.shape[1] ** -0.5).softmax(-1)[0, 1:]
    values = cls.float().numpy()
    low, high = np.percentile(values, 25), np.percentile(values, 75)
    n = len(values)
    count = int((values > high + 1.5 * (high - low)).sum())
    order = cls.topk(n).indices.tolist()
    chosen = order[:count]
    if plus:
        chosen = chosen + [j for j in range(0, n - 1, int(int(n / count) / 3)) if j not in chosen]
    features, keys = states[-2][1:], key[1:] / key[1:].norm(dim=-1, keepdim=True)
    sequence = []
    for j in chosen:
        others = [k for k in range(n) if k != j]
        near = sorted(others, key=lambda k: -float(keys[j] @ keys[k]))[:neighbours]
        sequence.append(features[j] + sum(cls[k] * features[k] for k in near))
    sequence.append(sum(cls[k] * features[k] for k in range(n) if k not in chosen))
    return {0: embedded(model, ids, model.model.multi_modal_projector(torch.stack(sequence)))[0]}


def fastv(model, ids, pixels, k=2, rate=0.5):
    """Before layer K: keep round(N (1 - R)) image tokens by the last token's attention in layer K - 1."""
    projector = model.model.multi_modal_projector
    hidden, start, end = embedded(model, ids, projector(tower(model, pixels)[0][-2][1:]))
    for layer in model.get_decoder().layers[:k]:
        hidden, weights = through(layer, hidden, model)
    best = weights[:, -1, start:end].mean(0).topk(round((end - start) * (1 - rate))).indices.sort().values
    return {k: torch.cat([hidden[:start], hidden[start:end][best], hidden[end:]])}


def dstp(model, ids, pixels, answer, k=2, rate=0.5, caught=0.8):
    """FastV, and while decoding a swap where the tokens in use catch less than a share of what the best ones would.

    answer: the ids that follow. Returns the set in use when each of them is predicted.
    """
    hidden, start, end = embedded(model, torch.cat([ids, answer]), projected(model, pixels))
    for layer in model.get_decoder().layers[:k]:
        hidden, weights = through(layer, hidden, model)
    n, used, found = end - start, None, []
    for newest in range(len(ids) - 1, len(ids) + len(answer) - 1):
        attention = weights[:, newest, start:end].mean(0).tolist()
        best = sorted(range(n), key=lambda j: -attention[j])[: round(n * (1 - rate))]
        if used is None or sum(attention[j] for j in used) < caught * sum(attention[j] for j in best):
            used = set(best)
        found.append(used)
    return found


def projected(model, pixels):
    return model.model.multi_modal_projector(tower(model, pixels)[0][-2][1:])


def divprune(model, ids, pixels, count=64):
    """Max-min cosine distance on projected tokens; the first has the farthest nearest neighbour."""
    features = projected(model, pixels)
    unit = features / features.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    chosen = []
    for step in range(count):
        if step == 0:
            scores = distance.topk(2, dim=0, largest=False).values[1]
        else:
            scores = distance[chosen].min(0).values
        chosen.append(int(scores.argmax()))
    return {0: embedded(model, ids, features[sorted(chosen)])[0]}


def vispruner(model, ids, pixels, count=64, important=0.5):
    """Half by [CLS] attention; of the rest, ordered by it, eight of every second token go that most resemble the others."""
    states, attention, _ = tower(model, pixels)
    features = states[-2][1:]
    unit = features / features.norm(dim=-1, keepdim=True)
    order = attention[len(attention) - 2][:, 0, 1:].mean(0).argsort(descending=True).tolist()
    first, rest = order[: int(count * important)], order[int(count * important) :]
    wanted = count - len(first)
    rest = rest if wanted else []
    while len(rest) > wanted:
        a, b = rest[::2], rest[1::2]
        likeness = (unit[a] @ unit[b].T).max(-1).values
        by_likeness = likeness.argsort(descending=True)[min(8, len(rest) - wanted) :]
        rest = [a[int(j)] for j in by_likeness] + b
    return {0: embedded(model, ids, model.model.multi_modal_projector(features[sorted(first + rest)]))[0]}


def cdpruner(model, ids, pixels, count=24):
    """Greedy MAP of a determinantal point process, by determinants; relevance from the instruction's embeddings (ours)."""
    features = projected(model, pixels)
    hidden, _, end = embedded(model, ids, features)
    unit, text = features / features.norm(dim=-1, keepdim=True), hidden[end:] / hidden[end:].norm(dim=-1, keepdim=True)
    relevance = (unit @ text.T).mean(1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min() + 1e-6)
    kernel = (relevance[:, None] * (unit @ unit.T) * relevance).double()
    chosen = []
    for _ in range(count):
        inside = kernel[chosen][:, chosen]
        cross = kernel[chosen]  # conditional variance of each item given those chosen
        left = kernel.diagonal() - (cross * torch.linalg.solve(inside, cross)).sum(0) if chosen else kernel.diagonal().clone()
        left[chosen] = -torch.inf
        chosen.append(int(left.argmax()))
    return {0: embedded(model, ids, features[sorted(chosen)])[0]}


def dart(model, ids, pixels, k=2, count=128, pivots=4):
    """Pivots by the L1 norm of keys in layer K - 1; each takes the ceil(count / 8) image tokens least like it."""
    hidden, start, end = embedded(model, ids, projected(model, pixels))
    decoder, keys = model.get_decoder(), []
    for layer in decoder.layers[:k]:
        cos, sin = (x[0] for x in rotary(model, hidden))
        raw = layer.self_attn.k_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, layer.self_attn.head_dim))
        half = raw.shape[-1] // 2
        turned = torch.cat([-raw[..., half:], raw[..., :half]], -1)
        keys = (raw * cos[:, None] + turned * sin[:, None]).flatten(1)
        hidden, _ = through(layer, hidden, model)
    size, state = keys.abs().sum(-1), decoder.norm(hidden)
    own = (start + size[start:end].topk(pivots).indices).tolist()
    theirs = (end + size[end:].topk(pivots).indices).tolist()
    chosen, left = list(own), [j for j in range(start, end) if j not in own]
    for pivot in own + theirs:
        like = torch.cosine_similarity(state[pivot][None], state[left])
        found = [left[int(j)] for j in (-like).topk(-(-count // (2 * pivots))).indices]
        chosen += found
        left = [j for j in left if j not in found]
    return {k: torch.cat([hidden[:start], hidden[sorted(chosen)], hidden[end:]])}
