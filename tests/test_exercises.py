"""The checks of exercises take the solutions and refuse near misses.

A near miss is a solution with one small mistake. The table below makes each by changing a piece of
the solution's text; further ones, which every exercise must refuse, are made from its cases.
"""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

from iapo_mini import exercises
from iapo_mini.exercises import (
    advantage,
    better_estimates,
    comparison,
    early_exit,
    estimates,
    foundations,
    four_bit,
    inference,
    length,
    mutual_information,
    quickstart,
    real_model,
    scaling,
    verbosity,
)
from iapo_mini.policy import load_policy
from iapo_mini.tools.course import check, passes

SOLUTIONS = sorted((Path(__file__).parent.parent / "notebooks" / "solutions").glob("*.ipynb"))
MODULES = (
    quickstart, foundations, verbosity, mutual_information, early_exit, estimates,
    better_estimates, advantage, length, four_bit, comparison, real_model, scaling, inference,
)  # fmt: skip
CASES = {
    name: function
    for module in MODULES
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__annotations__.get("return") == "list[Case]"
}
TOLERANCES = {
    "advantage_in_group": 1e-3, "token_loss": 1e-3, "entropies_by_postfix": 1e-3,
    "rounding_error": 1e-4,
}  # fmt: skip


def sources():
    """Name of each exercise -> (imports of its solution, the functions before and with it)."""
    found = {}
    for path in SOLUTIONS:
        imports, functions = [], []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] != "code" or "%pip" in text:
                continue
            for node in ast.parse(text).body:
                own = ast.get_source_segment(text, node)
                if isinstance(node, ast.Import | ast.ImportFrom) and "bitsandbytes" not in own:
                    imports.append(own)
                if isinstance(node, ast.FunctionDef):
                    functions.append(own)
                    found[node.name] = (list(imports), list(functions))
    return found


SOURCES = sources()


@pytest.fixture(scope="module")
def cases():
    """Cases of an exercise by its name; each is made once."""
    made = {}

    def of(name):
        if name not in made:
            needs = name == "entropies_by_postfix"
            policy = [load_policy("embedded", lora_rank=0, device="cpu")] if needs else []
            made[name] = CASES[name](*policy)
        return made[name]

    return of


def written(name, change=lambda text: text):
    """The solution as a function, after a change of its text."""
    imports, functions = SOURCES[name]
    own = change(functions[-1])
    space = {}
    # The one thing that a solution takes from its notebook: the levels of 4-bit weights.
    if "state.code" in own:
        space["state"] = type("State", (), {"code": four_bit.nf4_levels()})
    exec("\n\n".join([*imports, *functions[:-1], own]), space)
    return space[name]


def said(capsys, attempt, cases, tolerance):
    check(attempt, *cases, tolerance=tolerance)
    return " ".join(capsys.readouterr().out.split())


def test_every_exercise_has_hidden_cases_and_every_notebook_uses_them():
    used = []
    for path in SOLUTIONS:
        for folder in (path.parent, path.parent.parent):
            text = (folder / path.name).read_text(encoding="utf-8")
            checked = re.findall(r"check\((?:\\n\",\n\s*\" *)?(\w+),", text)
            assert all(f"*hidden.{n}(" in text for n in checked if n in CASES), path.name
        used += checked
    assert set(CASES) <= set(used)
    assert exercises.__doc__


@pytest.mark.parametrize("name", CASES)
def test_solution_is_right(name, cases, capsys):
    tolerance = TOLERANCES.get(name, 1e-5)
    assert said(capsys, written(name), cases(name), tolerance) == f"{name}: right"


@pytest.mark.parametrize("name", CASES)
def test_an_answer_of_the_first_case_is_refused(name, cases):
    _, first = cases(name)[0]
    assert not passes(lambda *arguments: first, *cases(name), tolerance=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_every_argument_counts(name, cases):
    """A function that takes one argument for that of the first case is refused."""
    solution, found = written(name), cases(name)
    # Beta, and the policy and rollouts of which there is one each.
    unused = {"only_when_right": (2,), "entropies_by_postfix": (0, 1)}
    for place in range(len(found[0][0])):
        if place in unused.get(name, ()):
            continue

        def ignores(*given, place=place):
            fixed = list(given)
            fixed[place] = found[0][0][place]
            return solution(*fixed)

        assert not passes(ignores, *found, tolerance=TOLERANCES.get(name, 1e-5)), place


NEAR_MISSES = [
    ("drops", "entropies[:-1] - entropies[1:]", "entropies[1:] - entropies[:-1]"),
    ("drops", "entropies[:-1] - entropies[1:]", "(entropies[:-1] - entropies[1:]).clamp(min=0)"),
    ("drops", "entropies[:-1] - entropies[1:]", "entropies[0] - entropies[1:]"),
    ("drops", "entropies[:-1] - entropies[1:]", "entropies.diff().abs()"),
    ("advantage_in_group", "/ rewards.std()", "/ rewards.std(correction=0)"),
    ("advantage_in_group", "rewards.std() == 0", "len(rewards) == 8"),
    ("advantage_in_group", "rewards - rewards.mean()", "rewards - rewards.median()"),
    ("ratio_of", "1000 * sum(correct) / sum(tokens)",
     "1000 * sum(c / t for c, t in zip(correct, tokens)) / len(tokens)"),
    ("ratio_of", "sum(tokens)", "sum(t for c, t in zip(correct, tokens) if c)"),
    ("ratio_of", "1000 * ", ""),
    ("moved", "chosen - p", "chosen"),
    ("moved", "chosen - p", "chosen * (1 - p)"),
    ("moved", "logits + rate", "logits - rate"),
    ("moved", " * advantage", ""),
    ("moved", "rate * ", ""),
    ("moved", "(logits + rate", "(p + rate"),
    ("moved", "chosen[token] = 1", "chosen[token] = p[token]"),
    ("token_loss", "statistics.stdev", "statistics.pstdev"),
    ("token_loss", " / statistics.stdev(rewards)", ""),
    ("token_loss", "statistics.fmean(rewards)", "statistics.median(rewards)"),
    ("token_loss", "-min(ratio * A, clipped * A)", "-clipped * A"),
    ("token_loss", "-min(ratio * A, clipped * A)", "-ratio * A"),
    ("token_loss", "-min(ratio", "-max(ratio"),
    ("token_loss", "-min(ratio", "min(ratio"),
    ("token_loss", "new / old", "old / new"),
    ("token_loss", "new / old", "1 + new - old"),
    ("token_loss", "1 + epsilon", "1.2"),
    ("token_loss", "1 - epsilon", "0.8"),
    ("first_loss", "-sum(advantages) / len(advantages)", "0.0"),
    ("first_loss", "-sum(advantages)", "sum(advantages)"),
    ("first_loss", "-sum(a * n", "sum(a * n"),
    ("first_loss", "a * n for", "a / n for"),
    ("first_loss", "a * n for", "a for"),
    ("first_loss", " / sum(lengths)", " / (len(lengths) * max(lengths))"),
    ("first_loss", '== "sequence"', '== "token"'),
    ("guess_too_low", "range(n + 1)", "range(n)"),
    ("guess_too_low", "math.comb(n, c) * ", ""),
    ("guess_too_low", "return total - (1 - (1 - p) ** k)", "return (1 - (1 - p) ** k) - total"),
    ("guess_too_low", "return total - (1 - (1 - p) ** k)", "return total"),
    ("guess_too_low", "return total - (1 - (1 - p) ** k)", "return total - p"),
    ("guess_too_low", "(1 - (1 - c / n) ** k)",
     "(1 - math.comb(n - c, k) / math.comb(n, k))"),
    ("dr_grpo", "r.mean(1, keepdim=True)", "r.mean()"),
    ("dr_grpo", "rewards.view(-1, group)", "rewards.view(group, -1)"),
    ("dr_grpo", "rewards.view(-1, group)", "rewards.view(-1, 2)"),
    ("dr_grpo", "(r - r.mean(1, keepdim=True))",
     "((r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True))"),
    ("token_mean", "(values * mask).sum()", "values.sum()"),
    ("token_mean", "/ mask.sum()", "/ mask.numel()"),
    ("token_mean", "(values * mask).sum() / mask.sum()",
     "((values * mask).sum(1) / mask.sum(1)).mean()"),
    ("token_mean", "(values * mask).sum() / mask.sum()", "values[values != 0].mean()"),
    ("token_mean", "values * mask", "values[:, : mask.sum(1).max()]"),
    ("clip_higher", "1 + high", "1 + 0.28"),
    ("clip_higher", "1 - low", "1 - 0.2"),
    ("clip_higher", "1 - low, 1 + high", "1 - high, 1 + low"),
    ("clip_higher", "torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)",
     "rho.clamp(1 - low, 1 + high) * A"),
    ("clip_higher", "torch.minimum", "torch.maximum"),
    ("silent_probability", " + (1 - p) ** group", ""),
    ("silent_probability", "p**group + (1 - p) ** group", "2 * p**group"),
    ("silent_probability", "p**group + (1 - p) ** group", "1 - p**group"),
    ("share_of_talk", '"compute", "format"', '"compute"'),
    ("share_of_talk", 'role not in ("compute", "format")', 'role in ("plan", "check")'),
    ("share_of_talk", 'role not in ("compute", "format")', 'role == "plan"'),
    ("share_of_talk", '("compute", "format")', '("compute", "format", "restate")'),
    ("share_of_talk", '("compute", "format")', '("compute", "format", "other")'),
    ("share_of_talk", "/ len(roles)", "/ 8"),
    ("share_of_talk", "len(roles)", 'max(1, len([r for r in roles if r != "format"]))'),
    ("entropy_of", "torch.special.xlogy(p, p)", "(p * p.log())"),
    ("entropy_of", "torch.special.xlogy(p, p)", "torch.special.xlogy(p, p) / math.log(2)"),
    ("entropy_of", ".sum(-1)", ".sum(0)"),
    ("entropy_of", ".sum(-1)", ".sum()"),
    ("parity_information", "return [", "return [0] * (n - 1) + [math.log(2)]\n    ["),
    ("parity_information", "heads**ones * (1 - heads) ** (n - ones)", "0.5**n"),
    ("parity_information", "range(1, n + 1)", "range(n, 0, -1)"),
    ("parity_information", "exact.conditional_mi(World(joint), t)",
     "exact.mutual_information(World(joint)) / n"),
    ("mean_belief_shift", "(world.prefix(t) * shift).sum()", "shift.mean()"),
    ("mean_belief_shift", "(after * (after.log()", "(before * (after.log()"),
    ("mean_belief_shift", "world.belief(t - 1)[..., None, :]", "world.belief(0)"),
    ("information_after_noise", " / answers", ""),
    ("information_after_noise", "string / answers", "string * world.belief(0)"),
    ("information_after_noise", "string / answers", "world.joint.mean()"),
    ("mean_drop", "answer_posterior(1)[value] @ after", "after.mean()"),
    ("mean_drop", "answer_posterior(left - 1)", "answer_posterior(left)"),
    ("mean_drop", "answer_posterior(1)[value] @ after", "after[value]"),
    ("first_sure", "entropy < h", "entropy <= h"),
    ("first_sure", "enumerate(entropies)", "enumerate(entropies, 1)"),
    ("first_sure", "next((j for j, entropy in enumerate(entropies) if entropy < h), -1)",
     "max((j for j, entropy in enumerate(entropies) if entropy < h), default=-1)"),
    ("first_sure", "(j for j, entropy in enumerate(entropies) if entropy < h), -1",
     "(j for j, entropy in enumerate(entropies) if entropy < h), 0"),
    ("net_saving", "(t + k + a)", "(t + a)"),
    ("net_saving", " - n * k", ""),
    ("net_saving", "n * k", "(n - 1) * k"),
    ("net_saving", "n * k", "n * (k + a)"),
    ("doubly_sure", "entropy < h", "entropy <= h"),
    ("doubly_sure", " and answer == before", ""),
    ("doubly_sure", "entropy < h and ", ""),
    ("doubly_sure", "before = answer", "before = answer if entropy < h else before"),
    ("doubly_sure", "answer == before",
     'answer in chain["answer"][: chain["asked"].index(t)]'),
    ("doubly_sure", 't + chain["suffix"]', "t"),
    ("doubly_sure", 't + chain["suffix"]', "t + 5"),
    ("doubly_sure", 'return chain["correct"], ', "return 1.0, "),
    ("saving", "(n + 1) * (p + k)", "n * (p + k)"),
    ("saving", "n * (n + 1) / 2", "n * (n - 1) / 2"),
    ("saving", "p + n + (n + 1) * k", "n + (n + 1) * k"),
    ("saving", "(n + 1) * k)", "k)"),
    ("postfix_positions", "mask.sum()", "len(mask)"),
    ("postfix_positions", "mask.sum() + t", "mask.sum() + t - 1"),
    ("postfix_positions", "mask.sum() + t", "mask.sum() + t + 1"),
    ("postfix_positions", "torch.arange(k)", "torch.arange(k) * 1.0"),
    ("packed_mask", "<= ends", "< ends"),
    ("packed_mask", ".tril()", ""),
    ("packed_mask", "(branch[:, None] == branch)", "torch.ones(len(branch), len(branch)).bool()"),
    ("packed_mask", "torch.cat([trunk, own], dim=1)", "torch.cat([trunk, own], dim=1).float()"),
    ("packed_mask", "torch.cat([trunk, own]", "torch.cat([own, trunk]"),
    ("entropies_by_postfix", "[0, t]", "[0, 0]"),
    ("entropies_by_postfix", "[0, t]", "[1, t]"),
    ("entropies_by_postfix", "[0, t]", "[0, t - 1]"),
    ("entropies_by_postfix", "hidden.POSTFIXES", "hidden.POSTFIXES[::-1]"),
    ("overconfidence", "confidence.double().mean() - correct", "correct.double().mean() - correct"),
    ("overconfidence", "return confidence.double().mean() - correct.double().mean()",
     "return (confidence.double().mean() - correct.double().mean()).abs()"),
    ("overconfidence", "confidence.double().mean()", "confidence[correct].double().mean()"),
    ("auc_from_ranks", "ranks[scores.argsort()] = np.arange(1, len(scores) + 1)",
     "ranks = scores.argsort() + 1"),
    ("auc_from_ranks", "np.arange(1, len(scores) + 1)", "np.arange(len(scores))"),
    ("auc_from_ranks", " - up * (up + 1) / 2", ""),
    ("auc_from_ranks", "(up * down)", "(up * len(scores))"),
    ("share_computing", "[-k:]", "[:k]"),
    ("share_computing", "[-k:]", "[-k - 1 :]"),
    ("share_computing", "scores.argsort()", "np.abs(scores).argsort()"),
    ("share_computing", ".mean()", ".sum()"),
    ("share_computing", "computes[best].mean()", "computes[best].sum() / computes.sum()"),
    ("shifts", "after.exp() *", "before.exp() *"),
    ("shifts", "log_p[:-1], log_p[1:]", "log_p[1:], log_p[:-1]"),
    ("shifts", ".sum(-1)", ".mean(-1)"),
    ("shifts", "after.exp() * (after - before)", "(after - before).abs()"),
    ("hidden_by_first_digit", "exact.entropy(p) - exact.entropy(first_digit(p))",
     "0.75 * np.log(3)"),
    ("hidden_by_first_digit", " - exact.entropy(first_digit(p))", ""),
    ("drift", "beliefs[:, 1:].gather(-1, guess)", "beliefs[:, 1:].amax(-1, keepdim=True)"),
    ("drift", "then - now", "now - then"),
    ("drift", "(then - now)", "(then - now).abs()"),
    ("drift", ".mean(0)", ".sum(0)"),
    ("drift", "argmax", "argmin"),
    ("share_of_truth", "C - j", "C - j + 1"),
    ("share_of_truth", "C - j", "j - 1"),
    ("share_of_truth", "lam **", "(1 - lam) **"),
    ("share_of_truth", "lam ** (C - j)", "(lam if j < C else 1.0)"),
    ("best_temperature", "min(temperatures, key=lambda T: float(loss(logits / T, labels)))",
     "temperatures[2]"),
    ("best_temperature", "min(temperatures", "max(temperatures"),
    ("best_temperature", "min(temperatures", "(lambda a, key: a[0])(temperatures"),
    ("best_temperature", "logits / T", "logits * T"),
    ("exploration_of", " * mask", ""),
    ("exploration_of", "1.0, -1.0", "-1.0, 1.0"),
    ("exploration_of", "logprobs.exp()", "logprobs"),
    ("exploration_of", "1.0, -1.0", "1.0, 0.0"),
    ("normalize_with_floor", "values.std().clamp(min=floor)", "(values.std() + floor)"),
    ("normalize_with_floor", "values.std()", "values.std(correction=0)"),
    ("normalize_with_floor", "clamp(min=floor)", "clamp(min=0.1)"),
    ("normalize_with_floor", "clamp(min=floor)", "clamp(max=floor)"),
    ("turning_alpha", "normalized_s.max()", "normalized_s.abs().max()"),
    ("turning_alpha", "normalized_s.max()", "normalized_s[-1]"),
    ("turning_alpha", "normalized_s.max()", "normalized_s[0]"),
    ("turning_alpha", "-A_i /", "A_i /"),
    ("only_when_right", " * rollouts.correct[:, None]", ""),
    ("only_when_right", "rollouts.correct[:, None]", "(~rollouts.correct)[:, None]"),
    ("only_when_right", "rollouts.informativeness, rollouts.completion_mask",
     "rollouts.informativeness"),
    ("only_when_right", "alpha * term", "0.4 * term"),
    ("only_when_right", "return ", "rollouts.rewards.mul_(2)\n    return "),
    ("predicted_change", "-eta *", "eta *"),
    ("predicted_change", " - (p * p.log()).sum() * (p * A).sum()", ""),
    ("predicted_change", "p = logits.softmax(-1)",
     "p = torch.ones_like(logits) / len(logits)"),
    ("covariance_of", " - (p @ a) * (p @ b)", ""),
    ("covariance_of", "p @ (a * b) - (p @ a) * (p @ b)", "torch.cov(torch.stack([a, b]))[0, 1]"),
    ("covariance_of", "p @ (a * b) - (p @ a) * (p @ b)",
     "(a * b).mean() - a.mean() * b.mean()"),
    ("spread_thinner", "(p @ lengths) * (p @ (1 / lengths))",
     "lengths.mean() * (1 / lengths).mean()"),
    ("spread_thinner", "C * ", ""),
    ("spread_thinner", "(p @ (1 / lengths))", "(1 / (p @ lengths))"),
    ("premise_holds", "exact.covariance(p, strings.lengths, per_token)",
     "torch.corrcoef(torch.stack([strings.lengths.double(), per_token]))[0, 1]"),
    ("premise_holds", "< 0", "> 0"),
    ("premise_holds", " / strings.lengths", ""),
    ("premise_holds", "bool(", "float("),
    ("premise_holds", "return bool(", "return True or bool("),
    ("order_of", "x = x - x.mean()",
     "return float((y[-1] - y[0]) / (x[-1] - x[0]))"),
    ("order_of", "x = x - x.mean()", "pass"),
    ("order_of", "torch.tensor(errors).double().log()", "torch.tensor(errors).double()"),
    ("steepest", "torch.autograd.grad(", "torch.autograd.grad(-"),
    ("steepest", "theory.expected_length(strings, theta), theta",
     "theory.expected_length(strings, theta).log(), theta"),
    ("steepest", "[0]", "[0].sign()"),
    ("steepest", "[0]", "[0].sum(1)"),
    ("lora_numbers", "rank * (inputs + outputs)", "rank * inputs * outputs"),
    ("lora_numbers", "rank * (inputs + outputs)", "16 * (inputs + outputs)"),
    ("lora_numbers", "rank * (inputs + outputs)", "inputs * outputs"),
    ("lora_numbers", "rank * (inputs + outputs)", "rank * (inputs + outputs) / 1"),
    ("bits_per_weight", "block * outer", "block * 256"),
    ("bits_per_weight", "32 / block", "16 / block"),
    ("bits_per_weight", "if double else 32 / block", ""),
    ("rounding_error", "w.reshape(-1, block)", "w.reshape(-1, 64)"),
    ("rounding_error", " / w.norm()", ""),
    ("rounding_error", "blocks.abs().amax(1, keepdim=True)", "blocks.abs().amax()"),
    ("rounding_error", "blocks.abs().amax(1, keepdim=True)", "blocks.amax(1, keepdim=True)"),
    ("rank_needed", ".square()", ""),
    ("rank_needed", " + 1", ""),
    ("rank_needed", "share * kept[-1]", "share"),
    ("pairing_gain", "x - y", "abs(x - y)"),
    ("pairing_gain", "statistics.stdev(a) ** 2 + statistics.stdev(b) ** 2",
     "2 * statistics.stdev(a) ** 2"),
    ("pairing_gain", "** 0.5", "** 1"),
    ("on_the_front", "a < n and b > p", "a <= n and b >= p"),
    ("on_the_front", "a < n and b > p", "a < n or b > p"),
    ("on_the_front", "a < n and b > p", "b > p"),
    ("on_the_front", "not any(a < n and b > p for a, b in points)",
     "p == max(b for _, b in points) or n == min(a for a, _ in points)"),
    ("ratio_of_guessing", "(1 - p) ** k", "(1 - p)"),
    ("ratio_of_guessing", "(1 - (1 - p) ** k)", "min(1, k * p)"),
    ("ratio_of_guessing", "/ tokens", "/ tokens / k"),
    ("false_discovery", "1 - 0.95**m", "0.05 * m"),
    ("false_discovery", "1 - 0.95**m", "0.05**m"),
    ("false_discovery", "1 - 0.95**m", "{1: 0.05, 8: 1 - 0.95**8}.get(m, 0.5)"),
    ("cache_size", "shape.kv_heads", "shape.heads"),
    ("cache_size", "2 * shape.layers", "shape.layers"),
    ("cache_size", " * width", " * 2"),
    ("cache_size", "shape.head_dim", "64"),
    ("reference_of", 'replace(",", "")', 'replace(",", "", 1)'),
    ("reference_of", "int(", "float("),
    ("reference_of", 'rpartition("####")[2]', "split()[-1].lstrip('-')"),
    ("asked_tokens", "1 + length // stride", "length // stride"),
    ("asked_tokens", " + (length % stride > 0)", ""),
    ("asked_tokens", "(length % stride > 0)", "1"),
    ("pass_of", "1 - math.comb(n - c, k) / math.comb(n, k)", "1 - (1 - c / n) ** k"),
    ("pass_of", "math.comb(n - c, k)", "math.comb(c, k)"),
    ("token_weight", "1 / (B * lengths[i])", "1 / lengths[i]"),
    ("token_weight", "1 / sum(lengths)", "1 / (B * max(lengths))"),
    ("token_weight", "1 / (B * limit)", "1 / limit"),
    ("token_weight", "B * limit", "B * 10"),
    ("groups_across", "(g + 1) * group - 1", "(g + 1) * group"),
    ("groups_across", "groups = share * ranks // group", "groups = share // group"),
    ("groups_across", "return sum(", "return bool(share % group) or sum("),
    ("prompts_per_update", " * accumulation", ""),
    ("prompts_per_update", " / group", ""),
    ("prompts_per_update", " * ranks", ""),
    ("rank_loss", "(sum(counts) / ranks)", "mask.sum()"),
    ("rank_loss", "(sum(counts) / ranks)", "sum(counts)"),
    ("rank_loss", "values * mask", "values"),
]  # fmt: skip


@pytest.mark.parametrize("name, right, wrong", NEAR_MISSES)
def test_a_near_miss_is_refused_and_told_the_case(name, right, wrong, cases, capsys):
    def change(text):
        assert right in text, text
        return text.replace(right, wrong)

    answer = said(capsys, written(name, change), cases(name), TOLERANCES.get(name, 1e-5))
    count = len(cases(name))
    assert re.match(rf"{name}: not yet, case [1-{count}] of {count}: {name}\(", answer), answer
    assert "off by" not in answer
    assert (" gave " in answer and ", wanted " in answer) or " raised " in answer or (
        " changed its argument " in answer
    ), answer  # fmt: skip


def test_every_exercise_has_near_misses():
    assert {name for name, _, _ in NEAR_MISSES} == set(CASES)


def test_cases_follow_their_seed():
    one, same, other = (verbosity.token_mean(seed) for seed in (1, 1, 2))
    assert torch.equal(one[0][0][0], same[0][0][0])
    assert not torch.equal(one[0][0][0], other[0][0][0])
