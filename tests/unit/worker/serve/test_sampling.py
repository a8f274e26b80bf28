"""What is drawn depends on logits, parameters, seed and position, with the probabilities that the parameters mean."""

import torch
from torch import nn

from pipelinejob_worker.serve.sampling import draw, uniform
from pipelinejob_worker.serve.wire import Sampling

LOGITS = torch.tensor([2.0, 0.5, 1.5, -1.0, 1.0, 0.0])
DRAWS = 4000


def tokens(sampling: Sampling, logits: torch.Tensor = LOGITS, draws: int = DRAWS) -> list[int]:
    drawn = draw(logits.expand(draws, -1), [sampling] * draws, range(draws))
    return [one.token for one in drawn if one.token is not None]


def shares(found: list[int]) -> torch.Tensor:
    return torch.bincount(torch.tensor(found), minlength=LOGITS.numel()) / len(found)


def assert_shares(found: list[int], expected: torch.Tensor) -> None:
    # Four standard deviations of a share over so many draws.
    assert (shares(found) - expected).abs().max() < 4 * (0.25 / len(found)) ** 0.5
    assert torch.equal(shares(found) > 0, expected > 0)


def test_temperature_0_takes_the_likeliest_and_the_lower_id_of_two() -> None:
    assert tokens(Sampling(temperature=0), draws=2) == [0, 0]
    assert tokens(Sampling(temperature=0), torch.tensor([0.0, 3.0, 3.0]), draws=1) == [1]


def test_tokens_come_with_the_probabilities_of_the_scaled_logits() -> None:
    assert_shares(tokens(Sampling()), LOGITS.softmax(0))
    assert_shares(tokens(Sampling(temperature=0.5)), (LOGITS / 0.5).softmax(0))


def test_top_k_keeps_the_likeliest() -> None:
    kept = torch.tensor([True, False, True, False, True, False])
    assert_shares(tokens(Sampling(top_k=3)), LOGITS.masked_fill(~kept, -torch.inf).softmax(0))
    assert set(tokens(Sampling(top_k=1), draws=50)) == {0}
    assert_shares(tokens(Sampling(top_k=100)), LOGITS.softmax(0))


def test_top_p_keeps_the_fewest_with_that_share_and_at_least_one() -> None:
    ordered = LOGITS.softmax(0).sort(descending=True).values
    share = float(ordered[:2].sum())
    two = torch.tensor([True, False, True, False, False, False])
    assert_shares(tokens(Sampling(top_p=share - 0.01)), LOGITS.masked_fill(~two, -torch.inf).softmax(0))
    three = torch.tensor([True, False, True, False, True, False])
    assert_shares(tokens(Sampling(top_p=share + 0.01)), LOGITS.masked_fill(~three, -torch.inf).softmax(0))
    assert set(tokens(Sampling(top_p=1e-9), draws=50)) == {0}


def test_a_row_is_drawn_the_same_beside_any_others() -> None:
    sampling = Sampling(seed=7, temperature=1.3, top_p=0.9)
    alone = draw(LOGITS[None], [sampling], [5])
    beside = draw(torch.stack((LOGITS.flip(0), LOGITS)), [Sampling(seed=1), sampling], [9, 5])
    assert beside[1] == alone[0]


def test_seed_and_position_both_change_what_is_drawn() -> None:
    numbers = {uniform(seed, position) for seed in (-1, 0, 1, 1 << 62) for position in range(100)}
    assert len(numbers) == 400
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(3, 4) == uniform(3, 4)


def test_log_probabilities_are_those_of_the_model_before_any_cut() -> None:
    expected = nn.functional.log_softmax(LOGITS.double(), 0)
    (drawn,) = draw(LOGITS[None], [Sampling(temperature=0.1, top_k=1, logprobs=True, top_logprobs=3)], [0])
    assert drawn.token == 0
    torch.testing.assert_close(torch.tensor(drawn.logprob, dtype=torch.float64), expected[0])
    assert [token for token, _ in drawn.alternatives] == [0, 2, 4]
    torch.testing.assert_close(
        torch.tensor([value for _, value in drawn.alternatives]).double(), expected[[0, 2, 4]], atol=1e-6, rtol=0
    )
    (plain,) = draw(LOGITS[None], [Sampling()], [0])
    assert (plain.logprob, plain.alternatives) == (None, ())


def test_a_row_that_is_not_finite_gives_no_token_and_others_do() -> None:
    rows = torch.stack((LOGITS, LOGITS.clone(), LOGITS.clone(), LOGITS.clone()))
    rows[1, 3] = torch.nan
    rows[2, 0] = torch.inf
    rows[3, 0] = -torch.inf  # a token that the model rules out
    drawn = draw(rows, [Sampling(temperature=0)] * 4, [0] * 4)
    assert [one.token for one in drawn] == [0, None, None, 2]


def test_tokens_that_the_model_rules_out_are_no_alternatives() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    (drawn,) = draw(logits, [Sampling(logprobs=True, top_logprobs=3)], [0])
    assert (drawn.token, drawn.logprob, drawn.alternatives) == (0, 0.0, ((0, 0.0),))
