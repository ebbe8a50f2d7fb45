"""Statistics and tables of HellaSwag results: accuracy by group, a paired test of two models.

A result is the dict that `hellaswag.evaluate` returns, plus the names of its model and protocol.
"""

import math
import textwrap

from kit.files import count
from kit.published import GPT3_HELLASWAG, HELLASWAG

METRICS = {"acc": "", "acc_norm": "_norm"}  # metric: the suffix of its keys in a result
CHANCE = 0.25  # one of four endings
GROUPS = {"activity": ("activity_label",), "split": ("split_type", "split")}  # --by: field names to try


def field(example, names):
    """The first of these fields that an example has as text, or None."""
    return next((example[name] for name in names if isinstance(example.get(name), str)), None)


def correct(examples, result, metric):
    """Whether each example was answered correctly: a list of bools."""
    predictions = result[f"predictions{METRICS[metric]}"]
    return [choice == example["label"] for choice, example in zip(predictions, examples)]


def accuracies(examples, result, indices=None):
    """n, acc, acc_norm and their standard errors as a dict, for all examples or those with these indices."""
    indices = range(len(examples)) if indices is None else indices
    values = {"n": len(indices)}
    for metric in METRICS:
        right = correct(examples, result, metric)
        p = values[metric] = sum(right[i] for i in indices) / len(indices)
        # the sample standard error, as lm-evaluation-harness computes it
        values[f"{metric}_stderr"] = (p * (1 - p) / max(1, len(indices) - 1)) ** 0.5
    return values


def accuracies_by(examples, result, by):
    """`accuracies` of each group of examples, largest group first: {group: dict}. by: a key of GROUPS."""
    groups = {}
    for index, example in enumerate(examples):
        groups.setdefault(field(example, GROUPS[by]), []).append(index)
    groups = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {group: accuracies(examples, result, indices) for group, indices in groups}


def mcnemar(only_a, only_b):
    """Two-sided p-value of the exact McNemar test.

    only_a, only_b: the numbers of examples that only A and only B got right. The result is the probability
    that only_a + only_b tosses of a fair coin are at least as uneven as these two numbers.
    """
    n = only_a + only_b
    binomial = tail = 1  # n choose 0, and the sum of n choose 0 to n choose k
    for k in range(min(only_a, only_b)):
        binomial = binomial * (n - k) // (k + 1)  # n choose k + 1
        tail += binomial
    return min(1.0, 2 * tail / 2**n)


def compare(examples, a, b):
    """Compare two results on the same examples: {"acc": dict, "acc_norm": dict}.

    Each dict holds the difference (B - A), the p-value of `mcnemar`, and the indices of the examples that
    only A (only_a) and only B (only_b) got right.
    """
    comparison = {}
    for metric in METRICS:
        pairs = list(enumerate(zip(correct(examples, a, metric), correct(examples, b, metric))))
        only_a = [i for i, pair in pairs if pair == (True, False)]
        only_b = [i for i, pair in pairs if pair == (False, True)]
        comparison[metric] = dict(difference=b[metric] - a[metric], p=mcnemar(len(only_a), len(only_b)),
                                  only_a=only_a, only_b=only_b)
    return comparison


def differing(comparison):
    """The indices of the examples that only one of two models got right by acc_norm."""
    return sorted(comparison["acc_norm"]["only_a"] + comparison["acc_norm"]["only_b"])


def with_error(result, metric):
    """A metric of a result with its standard error, to two digits of the latter: 0.251 ± 0.043.

    Without ± if all examples have the same outcome: then the error is unknown.
    """
    error = result[f"{metric}_stderr"]
    if not error:
        return f"{result[metric]:.2f}"
    digits = min(4, 1 - math.floor(math.log10(error)))
    return f"{result[metric]:.{digits}f} ± {error:.{digits}f}"


def titles(results):
    return ", ".join(f"{result['model']} ({result['protocol']})" for result in results)


def print_table(rows):
    """Print rows of equally many strings: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *cells in rows:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    print()


def print_examples(examples, indices, results):
    """Print the examples with these indices: context, endings, and the scores of each result."""
    print(f"log-likelihoods by {titles(results)}:")
    print("summed, and per token (completion) or character (harness); > the choice, * the correct ending\n")
    for index in indices:
        example = examples[index]
        print(f"example {index}: {example.get('activity_label', '')}")
        print(textwrap.fill(example["ctx"], 100))
        for i, ending in enumerate(example["endings"]):
            for result in results:
                for suffix in METRICS.values():
                    mark = ">" if result[f"predictions{suffix}"][index] == i else " "
                    print(f"{mark}{result[f'loglikelihoods{suffix}'][index][i]:9.3f}", end="  ")
            print("*" if i == example["label"] else " ", ending)
        print()


def print_groups(results, by, most=20):
    """Print the accuracy of the largest groups (see `accuracies_by`); small groups are mostly noise."""
    sizes = {group: values["n"] for group, values in results[0]["groups"].items()}
    rows = [[by, "n", *(metric for _ in results for metric in METRICS)]]
    for group in list(sizes)[:most]:
        cells = [with_error(result["groups"][group], metric) for result in results for metric in METRICS]
        rows.append([group, str(sizes[group]), *cells])
    print(f"by {by}, {titles(results)}:")
    print_table(rows)
    if len(sizes) > most:
        smaller = list(sizes.values())[most:]
        print(f"not shown, but in the output of --json: {count(len(smaller), 'group')} of at most "
              f"{count(smaller[0], 'example')}\n")


def print_published(results):
    """Print the results beside the published ones, which are of the whole validation set."""
    protocols = list(dict.fromkeys(result["protocol"] for result in results))
    rows = {}
    for result in results:
        rows.setdefault(result["model"], []).extend(result[metric] for metric in METRICS)
    for model, published in HELLASWAG.items():
        rows[f"{model}, published"] = [value for protocol in protocols for value in published[protocol]]
    print_table([["", *(f"{protocol} {metric}" for protocol in protocols for metric in METRICS)],
                 *([model, *("-" if value is None else f"{value:.4f}" for value in values)]
                   for model, values in rows.items())])
    print("GPT-3 by the protocol of its paper, 125M, 350M, 760M and 1.3B:",
          ", ".join(f"{value:.3f}" for value in GPT3_HELLASWAG.values()), end="\n\n")


def print_result(result):
    """Print a result in one line, with standard errors."""
    values = [f"{metric} {with_error(result, metric)}" for metric in METRICS]
    notes = [count(result["n"], "example")]
    if result["endings_cut"]:
        notes.append(f"{count(result['endings_cut'], 'ending')} truncated to the context")
    if all(abs(result[metric] - CHANCE) <= 2 * result[f"{metric}_stderr"] for metric in METRICS):
        notes.append(f"within noise of chance ({CHANCE})")
    print(f"{titles([result])}: HellaSwag {', '.join(values)} on {'; '.join(notes)}")


def print_comparison(comparison, protocol):
    for metric, values in comparison.items():
        p = f"{values['p']:.2f}" if values["p"] >= 0.01 else f"{values['p']:.0e}"
        print(f"B - A ({protocol}): {metric} {values['difference']:+.4f}, exact McNemar p = {p}; only A got "
              f"{count(len(values['only_a']), 'example')} right, only B {len(values['only_b'])}")
    indices = " ".join(map(str, differing(comparison))) or "none"
    print(textwrap.shorten(f"only one of them got right, by acc_norm: {indices}", 110, placeholder=" ..."))
