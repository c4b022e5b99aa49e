import numpy as np
import pytest

from lightning_mue.trace import StreamTrace, Trace

METRICS = ("accuracy", "anls")


def example(ids, steps=4, seed=0, **meta):
    """Return a trace in which everything about a sample follows from its id."""
    rows = [np.random.default_rng([seed, int(i[1:])]) for i in ids]
    lengths = np.array([r.integers(1, steps + 1) for r in rows])
    widest = int(lengths.max()) if len(ids) else 0

    def table(*shape):
        return np.stack([r.random(shape) for r in rows]).astype(np.float32)

    def scored(exits):
        return {metric: table(exits) for metric in METRICS}

    taken = (np.arange(widest) < lengths[:, None])[..., None]
    full = [np.pad(r.random((k, 2)), ((0, widest - k), (0, 0))) for r, k in zip(rows, lengths, strict=True)]
    gate = np.stack(full).astype(np.float32)
    streams = {
        "decoder": StreamTrace(
            (1, 2), 4, {"gate": gate}, {"anls": table(2), "accuracy": table(2)}, table(2) > 0.5, (gate > 0.3) & taken
        ),
        "vision": StreamTrace(
            (3,), 6, {"similarity": table(1)}, {"anls": table(1), "accuracy": table(1)}, table(1) > 0.5
        ),
    }
    clusters = [f"p{int(i[1:]) // 2}" for i in ids]
    full = {metric: np.array([r.random() for r in rows]) for metric in METRICS}
    groups = [f"g{int(i[1:]) % 3}" for i in ids]
    return Trace(list(ids), clusters, groups, full, lengths, lengths % 3, streams, meta)


def same(a, b):
    assert (a.sample_ids, a.clusters, a.groups, a.meta) == (b.sample_ids, b.clusters, b.groups, b.meta)
    assert a.full_score.keys() == b.full_score.keys()
    assert all((a.full_score[metric] == b.full_score[metric]).all() for metric in a.full_score)
    assert (a.lengths == b.lengths).all()
    assert (a.prompts == b.prompts).all()
    assert a.streams.keys() == b.streams.keys()
    for name, s in a.streams.items():
        t = b.streams[name]
        assert (s.layers, s.num_layers, s.scores.keys()) == (t.layers, t.num_layers, t.scores.keys())
        tables = [(s.scores, t.scores), (s.score_at, t.score_at), ({"same": s.same_at}, {"same": t.same_at})]
        for x, y in [(mine[k], theirs[k]) for mine, theirs in tables for k in mine]:
            assert x.dtype == y.dtype
            assert (x == y).all()
        assert (s.agree is None) == (t.agree is None)
        assert s.agree is None or (s.agree == t.agree).all()
    return True


IDS = [f"s{i:03d}" for i in range(30)]


def test_round_trip(tmp_path):
    trace = example(IDS, metric="accuracy", decode={"max_new_tokens": 4})
    trace.save(tmp_path / "deep" / "trace.safetensors")
    assert same(Trace.load(tmp_path / "deep" / "trace.safetensors"), trace)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["trace.safetensors"]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_merge_does_not_depend_on_ranks_order_or_repeats(tmp_path, world):
    expected = Trace.merge([example(IDS)])
    rng = np.random.default_rng(world)
    order = rng.permutation(IDS).tolist()
    shards = [example(order[rank::world]) for rank in range(world)] + [example(order[:3]), example(order[5:6])]
    merged = Trace.merge([shards[i] for i in rng.permutation(len(shards))])
    assert same(merged, expected)
    for rank, shard in enumerate(shards):  # through files, as ranks hand them over
        shard.save(tmp_path / f"{rank}")
    assert same(Trace.merge([Trace.load(path) for path in sorted(tmp_path.iterdir(), reverse=True)]), expected)


def test_merge_drops_repeats_and_ranks_that_saw_nothing():
    merged = Trace.merge(
        [example(["s002", "s001"]), example(["s001"]).select(np.array([], dtype=int)), example(["s001"])]
    )
    assert merged.sample_ids == ["s001", "s002"]
    with pytest.raises(ValueError, match="no rank saw any sample"):
        Trace.merge([])


def test_merge_refuses_what_does_not_belong_together():
    with pytest.raises(ValueError, match="different models, exits or settings"):
        Trace.merge([example(["s001"], fingerprint="a"), example(["s002"], fingerprint="b")])
    other = example(["s002"])
    other.streams["vision"].layers = (2,)
    with pytest.raises(ValueError, match="different models, exits or settings"):
        Trace.merge([example(["s001"]), other])


def test_select_takes_a_mask_or_an_order():
    trace = example(IDS)
    assert trace.select(np.array([4, 2])).sample_ids == ["s004", "s002"]
    assert trace.select(np.arange(30) < 2).sample_ids == ["s000", "s001"]
    assert same(trace.select(np.arange(30)), trace)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_files_are_refused(tmp_path, cut):
    path = tmp_path / "trace.safetensors"
    example(IDS).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"trace.safetensors is not a readable trace"):
        Trace.load(path)


def test_foreign_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors must hold a trace .*found None"):
        Trace.load(tmp_path / "model.safetensors")
    (tmp_path / "policy.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match=r"policy.json is not a readable trace"):
        Trace.load(tmp_path / "policy.json")
