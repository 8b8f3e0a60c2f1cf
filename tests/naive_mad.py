"""The MAD tasks drawn one sequence at a time, token by token, and programs that solve them: slow and plain on purpose.

Nothing here calls the code under test; a task is read for its numbers only. Aligned as labels of a causal LM.
"""

IGNORE = -100


# ---- generators: the definitions as loops ----------------------------------------------------------------------------


def draw(task, rng, training):
    """One sequence: (input_ids, labels) as lists."""
    return _DRAW[task.name](task, rng, training)


def _recall(task, rng, training):
    plain = task.vocab_size - task.noise_vocab_size
    keys = plain // 2
    pairs = task.seq_len // 2
    kept = rng.integers(pairs - 1)
    values, ids, labels = {}, [], []
    for i in range(pairs):
        if i < pairs - 1 and i != kept and task.frac_noise and rng.random() < task.frac_noise:
            ids += [plain + int(rng.integers(task.noise_vocab_size)) for _ in range(2)]
            labels += [IGNORE, IGNORE]
            continue
        key = int(rng.integers(keys)) if i < pairs - 1 else sorted(values)[rng.integers(len(values))]
        labels += [IGNORE, values.get(key, IGNORE)]
        if key not in values:
            values[key] = keys + int(rng.integers(plain - keys))
        ids += [key, values[key]]
    return ids, _next(ids) if training else labels


def _next(ids):
    return [IGNORE, *ids[1:]]


def _motif(rng, first, count, size):
    left = list(range(first, first + count))
    return tuple(left.pop(rng.integers(len(left))) for _ in range(size))


def _fuzzy(task, rng, training):
    pad = task.vocab_size - 1
    keys = pad // 2

    def key():
        size = 1 + int(rng.integers(task.key_motif)) if training else task.key_motif
        return _motif(rng, 0, keys, size)

    def value():
        return _motif(rng, keys, pad - keys, 1 + int(rng.integers(task.value_motif)))

    last, values, ids, labels = key(), {}, [], []
    values[last] = value()
    limit = task.seq_len - len(last) - len(values[last]) - task.key_motif - task.value_motif
    # The places where pairs begin, and in which of them the last key is put if chance does not
    place, shown = int(rng.integers(limit)), set()
    while len(ids) < limit:
        one, fresh = key(), value()
        size = len(one) + len(values.get(one, fresh))
        if last not in shown and (len(ids) >= place or len(ids) + size >= limit):
            one = last
        values.setdefault(one, fresh)
        labels += [IGNORE] * len(one)
        labels += list(values[one]) if one in shown else [IGNORE] * len(values[one])
        ids += [*one, *values[one]]
        shown.add(one)
    ids += [*last, *values[last]]
    labels += [IGNORE] * len(last) + list(values[last])
    padding = task.seq_len + 1 - len(ids)
    ids, labels = [pad] * padding + ids, [IGNORE] * padding + labels
    return ids, _next(ids) if training else labels


def _copying(task, rng, training):
    blank, copy, count = task.vocab_size - 2, task.vocab_size - 1, task.tokens_to_copy
    tokens = [int(rng.integers(task.vocab_size - 2)) for _ in range(count)]
    gaps = [0] * count
    for _ in range(task.seq_len - 2 * count - 1):
        gaps[rng.integers(count)] += 1
    ids = []
    for gap, token in zip(gaps, tokens):
        ids += [blank] * gap + [token]
    labels = [IGNORE] * (len(ids) + 2) + tokens
    return ids + [copy] + [blank] * (count + 1), labels


def _compression(task, rng, training):
    plain = task.vocab_size - 1 - task.noise_vocab_size
    ids, labels = [], []
    for _ in range(task.seq_len - 1):
        noise = task.frac_noise and rng.random() < task.frac_noise
        ids.append(plain + int(rng.integers(task.noise_vocab_size)) if noise else int(rng.integers(plain)))
        labels.append(IGNORE if noise else ids[-1])
    return [*ids, task.vocab_size - 1], [*labels, task.vocab_size - 1]


def _memorization(task, rng, training):
    insert, plain = task.vocab_size - 1, task.vocab_size - 1 - task.noise_vocab_size
    keys = plain // 2
    ids, labels = [], [IGNORE]
    for _ in range(task.seq_len // 2):
        key = int(rng.integers(keys))
        ids += [key, insert]
        labels += [IGNORE, keys + (3 * key) % keys]  # any fixed map
    return [*ids, insert], labels


_DRAW = {
    "in-context-recall": _recall,
    "noisy-in-context-recall": _recall,
    "fuzzy-in-context-recall": _fuzzy,
    "selective-copying": _copying,
    "compression": _compression,
    "memorization": _memorization,
}


# ---- oracles: what solves a task, from the tokens read so far and nothing else ---------------------------------------


def recall_oracle(task, read):
    """`read` ends with a key: what followed it before."""
    return dict(zip(read[:-1:2], read[1::2]))[read[-1]]


def fuzzy_oracle(task, read):
    """`read` ends within a pair whose key is complete: the next token of that key's value."""
    pairs = fuzzy_pairs(task, read)
    key, said = pairs[-1]
    return dict(pairs[:-1])[key][len(said)]


def fuzzy_pairs(task, read):
    """[(key, value)]: runs of key tokens and of value tokens, padding left out."""
    pad, keys = task.vocab_size - 1, (task.vocab_size - 1) // 2
    pairs, before = [], "value"
    for token in read:
        if token == pad:
            continue
        kind = "key" if token < keys else "value"
        if kind == "key" and before == "value":
            pairs.append([(), ()])
        pairs[-1][kind == "value"] += (token,)
        before = kind
    return [tuple(pair) for pair in pairs]


def copying_oracle(task, read):
    """`read` ends with the n-th blank behind the copy token: the n-th token that is not blank."""
    blank, copy = task.vocab_size - 2, task.vocab_size - 1
    at = read.index(copy)
    return [token for token in read[:at] if token != blank][len(read) - at - 2]
