"Sweeps of cloning from latent actions: games, windows, dictionaries, agents, bad input."

import importlib.util
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasses_nb.genie.cloning import (
    CloneAgent,
    ClonePolicy,
    KeyAgent,
    LabelledSteps,
    SquareGoals,
    Videos,
    _pick,
    _windows,
    action_chances,
    code_dictionary,
    expert_videos,
    goal_distances,
    goal_expert,
    join_videos,
    label_videos,
    play_games,
    train_clone,
)
from glasses_nb.genie.cloning_coinrun import CoinRunLevels, fastest_tries, replay_tries
from glasses_nb.genie.worlds import COINRUN_WEIGHTS, SquareWorld
from glasses_nb.hub import artifact

FEW = settings(max_examples=25, deadline=None)


def small_videos(lengths, seed=0, K=3, image=16):
    "Random frames and actions."
    rng = np.random.default_rng(seed)
    return join_videos([(rng.integers(0, 256, (n, image, image, 3), dtype=np.uint8), rng.integers(0, K, n - 1)) for n in lengths])


def lively(K=3, seed=0, **more):
    "A policy whose last layer is not zero."
    policy = ClonePolicy(K, image=16, width=4, seed=seed, **more).eval()
    with torch.no_grad():
        policy.head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return policy


# games

@FEW
@given(st.integers(2, 6), st.integers(0, 2**16), st.floats(0, 0.5))
def test_distances_agree_with_relaxation(n, seed, share):
    rng = np.random.default_rng(seed)
    solid = rng.random((n, n)) < share
    goal = tuple(rng.integers(0, n, 2))
    solid[goal] = False
    far = np.full((n, n), np.inf)
    far[goal] = 0
    for _ in range(n * n):  # each place is one more than its nearest neighbour
        wide = np.pad(far, 1, constant_values=np.inf)
        near = np.minimum.reduce([wide[1:-1, :-2], wide[1:-1, 2:], wide[:-2, 1:-1], wide[2:, 1:-1]])
        far = np.where(solid, np.inf, np.minimum(far, near + 1))
    assert (goal_distances(solid, goal) == np.where(np.isinf(far), -1, far)).all()


@FEW
@given(st.integers(0, 2**16), st.sampled_from([(32, 8, 2), (24, 4, 6), (16, 4, 0)]), st.integers(1, 3))
def test_expert_needs_the_distance(seed, sizes, apart):
    games = SquareGoals(4, seed, SquareWorld(sizes[0], sizes[1], blocks=sizes[2]), apart)
    far = [level[3][tuple(level[4])] for level in games.levels]
    rng = np.random.default_rng(seed)
    played = play_games(games, lambda frames, live: goal_expert(games, rng))
    assert played.won.all() and list(played.steps) == far and min(far) >= apart


def test_copies_are_one_level_and_seeds_are_not():
    games = SquareGoals(3, seed=1, copies=2)
    assert (games.frames[::2] == games.frames[1::2]).all()
    assert (games.frames != SquareGoals(3, seed=2, copies=2).frames).any()


def test_lost_games_stop_at_the_limit_and_ended_games_stay():
    games = SquareGoals(20, seed=4)
    rng = np.random.default_rng(0)
    first = play_games(games, lambda frames, live: np.where(np.arange(20) < 10, goal_expert(games, rng), 0), limit=12)
    assert first.won.tolist() == [True] * 10 + [False] * 10
    assert (first.steps[10:] == 12).all() and len(first.actions) == 12
    before = games.state[:10].copy()
    games.step(np.full(20, 1))
    assert (games.state[:10] == before).all()


def test_the_mark_is_on_the_goal_until_it_is_reached():
    games = SquareGoals(5, seed=0)
    red = (games.frames == (220, 40, 40)).all(-1)
    for m, (_, _, goal, *_) in enumerate(games.levels):
        assert {tuple(at // 8) for at in np.argwhere(red[m])} == {tuple(goal)} and red[m].sum() == 16
    rng = np.random.default_rng(0)
    play_games(games, lambda frames, live: goal_expert(games, rng))
    assert not (games.frames == (220, 40, 40)).all(-1).any()


@FEW
@given(st.lists(st.floats(0, 5), min_size=2, max_size=5).filter(lambda w: sum(w) > 0.1), st.integers(0, 99))
def test_keys_follow_their_weights(weights, seed):
    drawn = KeyAgent(weights, seed=seed)(None, np.ones(20_000, bool))
    assert np.abs(np.bincount(drawn, minlength=len(weights)) / 20_000 - np.array(weights) / sum(weights)).max() < 0.02


def test_keys_last_as_long_as_they_should():
    agent = KeyAgent([1, 1], switch=0.2, seed=0)
    pressed = np.stack([agent(None, np.ones(2000, bool)) for _ in range(50)])
    assert abs((pressed[1:] != pressed[:-1]).mean() - 0.1) < 0.01


# videos and codes

@FEW
@given(st.integers(2, 60), st.integers(2, 16), st.data())
def test_windows_name_each_step_once(length, window, data):
    context = data.draw(st.integers(0, window - 2))
    named = []
    for begin, first in _windows(length, window, context):
        assert 0 <= begin <= length - 2 and (begin == 0 or first - begin == context)
        named += range(first, min(length - 1, begin + window - 1))
    assert named == list(range(length - 1))


class Stub:
    "Names a step by the first pixel of its second frame, and remembers what it saw."

    def __init__(self, window):
        self.encoder = SimpleNamespace(config=SimpleNamespace(frames=window))
        self.places = []

    def infer(self, frames):
        assert frames.shape[1] == self.encoder.config.frames
        return torch.from_numpy(frames[:, 1:, 0, 0, 0].astype(int))


@FEW
@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.integers(2, 9), st.integers(1, 7), st.data())
def test_codes_belong_to_their_steps(lengths, window, batch, data):
    videos = small_videos(lengths)
    codes = label_videos(Stub(window), videos, data.draw(st.integers(0, window - 2)), batch)
    assert (codes[videos.steps] == videos.frames[videos.steps + 1, 0, 0, 0]).all()
    assert (codes[videos.actions < 0] == -1).all()


def test_a_step_has_the_context_it_was_promised():
    videos = small_videos([40])
    stub = Stub(9)
    stub.infer = lambda frames: torch.arange(8).expand(len(frames), 8)  # the place in the window
    assert label_videos(stub, videos, 3).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, *([3, 4, 5, 6, 7] * 7)][:39] + [-1]


@FEW
@given(st.lists(st.integers(2, 7), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_rows_hold_the_past_of_their_own_video(lengths, F, seed):
    videos = small_videos(lengths, seed)
    rows = LabelledSteps(videos, videos.actions, F, 3)
    i = 0
    for begin, n in zip(np.cumsum(lengths) - lengths, lengths):
        for j in range(n - 1):
            row = rows[i]
            past = [max(j + d, 0) for d in range(1 - F, 1)]
            assert (row["frames"].numpy() == videos.frames[begin + np.array(past)]).all()
            assert row["previous"].tolist() == [videos.actions[begin + j + d] if j + d >= 0 else 3 for d in range(1 - F, 0)]
            assert row["label"] == videos.actions[begin + j]
            i += 1
    assert i == len(rows)
    whole = rows.__getitems__(list(range(len(rows))))
    assert (whole["frames"][-1] == rows[i - 1]["frames"]).all()


def test_expert_videos_end_at_the_goal_and_repeat():
    a, b = expert_videos(6, seed=3), expert_videos(6, seed=3)
    assert (a.frames == b.frames).all() and (a.actions == b.actions).all()
    last = a.frames[np.cumsum(a.lengths) - 1]
    assert not (last == (220, 40, 40)).all(-1).any()
    assert (a.actions[a.steps] > 0).all()  # it never rests


# dictionaries

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30)


@FEW
@given(PAIRS)
def test_counts_and_chances(pairs):
    counts = code_dictionary(*zip(*pairs), (4, 5))
    assert all(counts[k, u] == Counter(pairs)[k, u] for k in range(4) for u in range(5))
    for how in ("list", "vote"):
        D = action_chances(counts, how)
        assert np.allclose(D.sum(1), 1) and (D >= 0).all()
        for k in range(4):
            seen = [u for c, u in pairs if c == k] or [u for _, u in pairs]
            often = Counter(seen)
            if how == "list":
                assert np.allclose(D[k], [often[u] / len(seen) for u in range(5)])
            else:
                assert set(np.flatnonzero(D[k])) == {u for u in often if often[u] == max(often.values())}


@FEW
@given(PAIRS, st.permutations(range(4)))
def test_names_of_codes_do_not_matter(pairs, order):
    codes, actions = map(np.array, zip(*pairs))
    plain, renamed = code_dictionary(codes, actions, (4, 5)), code_dictionary(np.array(order)[codes], actions, (4, 5))
    assert (renamed[list(order)] == plain).all()


@FEW
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda p: sum(p) > 0.1), st.floats(0, 1, exclude_max=True))
def test_pick_inverts_the_sums(weights, u):
    p = np.array(weights) / sum(weights)
    i = int(_pick(p[None], np.array([u]))[0])
    assert p[:i].sum() <= u + 1e-9 and (u <= p[:i + 1].sum() + 1e-9)


# policies and agents

def test_an_untrained_policy_is_even_and_small():
    policy = ClonePolicy(6)
    out = policy(torch.randint(256, (2, 4, 64, 64, 3), dtype=torch.uint8), torch.full((2, 3), 6))
    assert (out == 0).all() and sum(p.numel() for p in policy.parameters()) < 500_000


@pytest.mark.parametrize("previous", [True, False])
def test_what_a_policy_sees(previous):
    policy = lively(frames=3, previous=previous)
    frames, codes = torch.randint(256, (1, 3, 16, 16, 3), dtype=torch.uint8), torch.tensor([[0, 2]])
    out = policy(frames, codes)
    for f in range(3):
        other = frames.clone()
        other[:, f] = 255 - other[:, f]
        assert (policy(other, codes) != out).any()
    assert ((policy(frames, torch.tensor([[1, 2]])) != out).any()) == previous
    assert ((policy(frames, torch.tensor([[2, 0]])) != out).any()) == previous  # order counts


def test_a_batch_is_its_rows():
    policy = lively(frames=2)
    frames, codes = torch.randint(256, (4, 2, 16, 16, 3), dtype=torch.uint8), torch.randint(4, (4, 1))
    each = torch.cat([policy(frames[i:i + 1], codes[i:i + 1]) for i in range(4)])
    assert torch.allclose(policy(frames, codes), each, atol=1e-5)


class Pictures:
    "Games that show random frames; game m ends after m + 1 steps, unless it never does."
    actions = 4

    def __init__(self, games=5, endless=False, seed=0):
        self.rng, self.over, self.won, self.t, self.endless = np.random.default_rng(seed), np.zeros(games, bool), np.zeros(games, bool), 0, endless
        self.frames = self.rng.integers(0, 256, (games, 16, 16, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.over)

    def step(self, actions):
        assert np.shape(actions) == (len(self),)
        self.frames = self.rng.integers(0, 256, self.frames.shape, dtype=np.uint8)
        self.t += 1
        if not self.endless:
            self.over = np.arange(len(self)) < self.t


def test_a_game_does_not_feel_the_others():
    D = np.random.default_rng(0).dirichlet(np.ones(4), 3)
    ends = play_games(Pictures(), CloneAgent(lively(), D, 7))
    goes_on = play_games(Pictures(endless=True), CloneAgent(lively(), D, 7), 5)
    assert ends.steps.tolist() == [1, 2, 3, 4, 5]
    for m in range(5):
        assert (ends.actions[:m + 1, m] == goes_on.actions[:m + 1, m]).all()


def test_dictionaries_for_each_game():
    D = np.random.default_rng(0).dirichlet(np.ones(4), (5, 3))
    mixed = play_games(Pictures(endless=True), CloneAgent(lively(), D, 1), 6).actions
    for m in range(5):
        assert (mixed[:, m] == play_games(Pictures(endless=True), CloneAgent(lively(), D[m], 1), 6).actions[:, m]).all()


def test_draws_follow_policy_and_dictionary():
    policy, D = lively(frames=1), np.random.default_rng(2).dirichlet(np.ones(4), 3)
    frames = np.repeat(Pictures(1).frames, 40_000, 0)
    p = torch.softmax(policy(torch.from_numpy(frames[:1, None]), torch.zeros(1, 0, dtype=torch.long)), -1).detach().numpy()[0]
    small = np.concatenate([CloneAgent(policy, D, seed)(frames[:4000], np.ones(4000, bool)) for seed in range(10)])
    assert np.abs(np.bincount(small, minlength=4) / 40_000 - p @ D).max() < 0.015
    even = np.concatenate([CloneAgent(policy, np.eye(3), seed, random=1.0)(frames[:4000], np.ones(4000, bool)) for seed in range(10)])
    assert np.abs(np.bincount(even, minlength=3) / 40_000 - 1 / 3).max() < 0.015
    best = CloneAgent(policy, np.eye(3), temperature=0)(frames[:9], np.ones(9, bool))
    assert (best == p.argmax()).all()


def test_an_agent_remembers_frames_and_codes():
    seen = []

    class Spy(ClonePolicy):
        def forward(self, frames, previous):
            seen.append((frames.numpy().copy(), previous.numpy().copy()))
            return super().forward(frames, previous)

    agent = CloneAgent(Spy(3, image=16, frames=3, width=4).eval(), np.eye(3), 0)
    shown = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), dtype=np.uint8)
    pressed = [agent(f, np.ones(2, bool)) for f in shown]
    assert (seen[0][0] == shown[[0, 0, 0]].swapaxes(0, 1)).all() and (seen[0][1] == 3).all()
    assert (seen[1][0] == shown[[0, 0, 1]].swapaxes(0, 1)).all() and (seen[1][1][:, 0] == 3).all() and (seen[1][1][:, 1] == pressed[0]).all()
    assert (seen[2][0] == shown.swapaxes(0, 1)).all() and (seen[2][1] == np.stack(pressed[:2], 1)).all()


def test_training_learns_resumes_and_leaves_evaluation_mode(tmp_path):
    videos = small_videos([9] * 12)
    labels = np.where(videos.actions < 0, -1, 0)
    for i in videos.steps:  # the label before, plus one
        labels[i] = 0 if i == videos.begins[i] else (labels[i - 1] + 1) % 3
    made = dict(image=16, frames=2, width=4)
    history = train_clone(whole := ClonePolicy(3, **made), videos, labels, steps=40, lr=1e-2, batch_size=32, progress=False)
    assert history.loss.iloc[0] == pytest.approx(np.log(3), abs=1e-4) and history.loss.iloc[-5:].mean() < 0.5
    assert not whole.training
    for stop in (True, False):
        policy = ClonePolicy(3, **made)
        options = dict(steps=40, lr=1e-2, batch_size=32, progress=False, folder=tmp_path, save_every=8)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                train_clone(policy, videos, labels, evaluate=interrupt, evaluate_every=25, **options)
        else:
            train_clone(policy, videos, labels, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), policy.state_dict().values()))


def interrupt(model):
    raise KeyboardInterrupt


def test_shift_moves_frames(tmp_path):
    videos = small_videos([9] * 8)
    runs = [train_clone(ClonePolicy(3, image=16, frames=1, width=4), videos, videos.actions, steps=5, batch_size=16, shift=s, progress=False).loss.tolist() for s in (0, 0, 3)]
    assert runs[0] == runs[1] != runs[2]


# bad input

VIDEOS = small_videos([3, 4])
BAD = {
    "limit": (lambda: play_games(SquareGoals(1), None, 0), "limit must be at least 1"),
    "torus": (lambda: SquareGoals(1, world=SquareWorld(walls=False)), "needs walls"),
    "no level": (lambda: SquareGoals(0), "start at 1"),
    "too far": (lambda: SquareGoals(1, apart=40), "no level has a start 40 steps"),
    "weights": (lambda: KeyAgent([1, -1]), "weights"),
    "switch": (lambda: KeyAgent([1, 1], 0), "switch"),
    "one frame": (lambda: Videos(VIDEOS.frames, np.array([1, 6]), VIDEOS.actions), "at least two"),
    "floats": (lambda: Videos(VIDEOS.frames / 255, VIDEOS.lengths, VIDEOS.actions), "uint8"),
    "lengths": (lambda: Videos(VIDEOS.frames, np.array([3, 3]), VIDEOS.actions), "lengths"),
    "last action": (lambda: Videos(VIDEOS.frames, np.array([4, 3]), VIDEOS.actions), "-1 for the last frame"),
    "context": (lambda: label_videos(Stub(4), VIDEOS, 3), "0 to 2"),
    "one action": (lambda: ClonePolicy(1), "two actions"),
    "image": (lambda: ClonePolicy(2, image=30), "multiples of 16"),
    "frames": (lambda: lively()(torch.zeros(1, 3, 16, 16, 3), torch.zeros(1, 3, dtype=torch.long)), "wanted frames"),
    "codes before": (lambda: lively()(torch.zeros(1, 4, 16, 16, 3), torch.zeros(1, 4, dtype=torch.long)), "wanted frames"),
    "label too high": (lambda: LabelledSteps(VIDEOS, VIDEOS.actions, 2, 1 if VIDEOS.actions.max() >= 1 else 0), "label below"),
    "labels of another length": (lambda: LabelledSteps(VIDEOS, VIDEOS.actions[:-1], 2, 3), "for each of 7 frames"),
    "no labels": (lambda: LabelledSteps(VIDEOS, np.full(7, -1), 2, 3), "label below"),
    "empty dictionary": (lambda: code_dictionary([], [], (2, 2)), "one at least"),
    "unequal": (lambda: code_dictionary([0, 1], [0], (2, 2)), "as many"),
    "code": (lambda: code_dictionary([2], [0], (2, 2)), "codes must lie in 0 to 1"),
    "action": (lambda: code_dictionary([0], [-1], (2, 2)), "actions must lie"),
    "how": (lambda: action_chances(np.ones((2, 2)), "mean"), "list or vote"),
    "rows": (lambda: CloneAgent(lively(), np.eye(4)), "need 3 rows"),
    "temperature": (lambda: CloneAgent(lively(), np.eye(3), temperature=-1), "temperature"),
    "random": (lambda: CloneAgent(lively(), np.eye(3), random=1.5), "random"),
    "no CoinRun level": (lambda: CoinRunLevels([]), "there must be a level"),
    "a try too few": (lambda: replay_tries([1, 2], [np.zeros(3, int)]), "2 levels and 1 tries"),
    "enough": (lambda: CoinRunLevels([0], enough=0), "a win to wait for"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, text = BAD[case]
    with pytest.raises(ValueError, match=text):
        call()


# CoinRun

@pytest.fixture(scope="module")
def envpool():
    if importlib.util.find_spec("envpool") is None:  # importing it before Qt is there would spoil it
        pytest.skip("EnvPool is not installed")


def test_games_repeat_whatever_plays_beside_them(envpool):
    def run(levels, copies, own):
        games = CoinRunLevels(levels, copies)
        agent = KeyAgent(COINRUN_WEIGHTS, 1 / 6, 3)
        keys = [agent(None, np.ones(4, bool)) for _ in range(30)]
        shown = []
        for row in keys:
            shown.append(games.frames[own].copy())
            games.step(np.full(len(games), row[0]))
        games.close()
        return np.stack(shown)
    alone = run([7], 1, 0)
    assert (alone == run([3, 7], 2, 2)).all() and (alone == run([3, 7], 2, 3)).all()
    assert (alone != run([3, 7], 2, 0)).any()


def test_tries_are_kept_in_order_and_can_be_played_again(envpool):
    kept = fastest_tries(4, KeyAgent(COINRUN_WEIGHTS, 1 / 6, 0), tries=16, keep=3, limit=200)
    assert len(kept) == 3 and [len(k) for k in kept] == sorted(len(k) for k in kept)
    one = fastest_tries(4, KeyAgent(COINRUN_WEIGHTS, 1 / 6, 0), tries=16, keep=1, limit=200)
    assert (one[0] == kept[0]).all()
    videos = replay_tries([4] * 3, kept, batch=2)
    assert videos.lengths.tolist() == [len(k) for k in kept]
    assert (videos.actions[videos.steps] == np.concatenate([k[:-1] for k in kept])).all()
    with pytest.raises(ValueError, match="do not end at the coin"):
        replay_tries([4], [kept[0][:-1]])
    assert fastest_tries(0, lambda frames, live: np.full(len(live), 4), tries=2, limit=20) == []  # who stands still gets nowhere


# what ships

def test_shipped_expert_reaches_the_coin(envpool):
    tries = pd.read_csv(artifact("genie", "cloning_expert.csv"), dtype={"actions": str}, keep_default_na=False)
    assert (tries.actions.str.len() == tries.length).all() and tries.level.is_unique
    assert tries.actions.str.fullmatch("[0-9a-e]*").all()
    some = tries[tries.length > 0].iloc[::60]
    videos = replay_tries(list(some.level), [np.array([int(c, 16) for c in keys]) for keys in some.actions])
    assert videos.lengths.tolist() == some.length.tolist()


def test_shipped_table_is_whole():
    table = pd.read_csv(artifact("genie", "cloning.csv"))
    assert table.score.between(0, 1).all() and not table.duplicated(["policy", "labelled", "how", "seed"]).any()
    seeds = 3
    assert (table.groupby("policy").seed.nunique() == 3).all()
    for name in ("latent", "shuffled"):
        own = table[table.policy == name]
        assert len(own) == seeds * 4 * 2 and set(own.labelled) == {10, 50, 200, 1000} and own.recovered.between(0, 1).all()
    assert {"random", "sticky, of the clips", "sticky, of the search", "oracle", "oracle, a tenth random"} < set(table.policy)
