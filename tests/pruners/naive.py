"""One-image references, written from the formulas in plain loops and float64; slow and obvious on purpose."""

from __future__ import annotations

import numpy as np

SAME = 1e-6


def unit(x):
    return np.array([row / max(float(np.sqrt((row * row).sum())), 1e-6) for row in np.asarray(x, dtype=np.float64)])


def cosines(x):
    u = unit(x)
    s = np.array([[float(a @ b) for b in u] for a in u])
    s[s >= 1 - SAME] = 1.0
    return s


def argmax(values, allowed):
    best = None
    for i in allowed:
        if best is None or values[i] > values[best] + 1e-12:
            best = i
    return best


def cls_topk(attention, k):
    return sorted(sorted(range(len(attention)), key=lambda i: (-attention[i], i))[:k])


def divprune(x, k, centered=False):
    x = np.asarray(x, dtype=np.float64)
    n = len(x)
    worth = np.ones(n)
    if centered:
        raw = unit(x)
        like = np.array([np.mean([raw[i] @ raw[j] for j in range(n) if j != i] or [0.0]) for i in range(n)])
        span = like.max() - like.min()
        if span > SAME:
            worth = (like.max() - like) / span
        shifted = x - x.mean(0)
        for i in range(n):
            if np.linalg.norm(shifted[i]) <= SAME * np.linalg.norm(x[i]):
                shifted[i] = 0
        x = shifted
    d = 1 - cosines(x)
    first = [worth[i] * min([d[i, j] for j in range(n) if j != i] or [2.0]) for i in range(n)]
    picks = [argmax(first, range(n))]
    while len(picks) < k:
        score = [worth[i] * min(d[i, j] for j in picks) for i in range(n)]
        picks.append(argmax(score, [i for i in range(n) if i not in picks]))
    return sorted(picks)


def relevance(x, text):
    score = np.array([-np.mean([a @ b for b in unit(text)]) for a in unit(x)])
    span = score.max() - score.min()
    return (score - score.min() + 1e-6) / span if span > SAME else np.ones(len(score))


def dpp(x, k, text=None):
    s = cosines(x)
    n = len(s)
    q = np.ones(n) if text is None else relevance(x, text)
    kernel = q[:, None] * s * q[None, :]
    picks: list[int] = []
    while len(picks) < k:
        # The gain is the Schur complement of what is picked already; a spanned token gains nothing.
        gain = np.zeros(n)
        base = [p for i, p in enumerate(picks) if i == 0 or adds(kernel, picks[:i], p)]
        for i in range(n):
            gain[i] = schur(kernel, base, i) if kernel[i, i] > 0 else 0.0
            if gain[i] <= SAME * kernel[i, i] or gain[i] < 1e-12:
                gain[i] = 1e-12
        picks.append(argmax(gain / gain.max(), [i for i in range(n) if i not in picks]))
    return sorted(picks)


def schur(kernel, base, i):
    if not base:
        return kernel[i, i]
    inner = kernel[np.ix_(base, base)]
    return float(kernel[i, i] - kernel[i, base] @ np.linalg.solve(inner, kernel[base, i]))


def adds(kernel, before, i):
    base = [p for n, p in enumerate(before) if n == 0 or adds(kernel, before[:n], p)]
    return kernel[i, i] > 0 and schur(kernel, base, i) > SAME * kernel[i, i]


def vispruner(x, attention, k, share=0.5):
    order = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    salient, rest = order[: int(k * share)], order[int(k * share) :]
    want = k - len(salient)
    s = cosines(x)
    while want and len(rest) > want:
        even, odd = rest[0::2], rest[1::2]
        likeness = {e: max([s[e, o] for o in odd] or [-2.0]) for e in even}
        count = min(8, len(rest) - want, len(even))
        falling = sorted(range(len(even)), key=lambda p: (-round(likeness[even[p]], 9), p))
        gone = {even[p] for p in falling[:count]}
        rest = [r for r in rest if r not in gone]
    return sorted(salient + (rest if want else []))


def scope(x, attention, k, alpha=1.0):
    s = cosines(x)
    n = len(s)
    picks: list[int] = []
    covered = np.zeros(n)
    while len(picks) < k:
        gain = [attention[v] ** alpha * sum(max(0.0, s[u, v] - covered[u]) for u in range(n)) for v in range(n)]
        best = argmax(gain, [i for i in range(n) if i not in picks])
        picks.append(best)
        covered = np.maximum(covered, s[:, best])
    return sorted(picks)


def visionzip(x, keys, attention, k, contextual):
    order = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    dominant = order[: k - contextual]
    rest = [i for i in range(len(x)) if i not in dominant]
    step = max(len(rest) // contextual, 1) if contextual else 1
    targets = [rest[c * step] for c in range(contextual) if c * step < len(rest)]
    u = unit(keys)
    members: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets and targets:
            members[targets[argmax([u[i] @ u[t] for t in targets], range(len(targets)))]].append(i)
    out = []
    for i in sorted(dominant + targets):
        group = members.get(i, [])
        mean = np.mean([x[m] for m in group], axis=0) if group else 0.0
        out.append((i, x[i] + mean, 1 + len(group)))
    return out
