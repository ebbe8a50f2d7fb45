"""What HellaSwag's results are good for: figures by group, a test of two models, tables for a person.

A result is the dict that `hellaswag.evaluate` returns, with the names of its model and protocol for printing.
"""

import textwrap

from published import GPT3_HELLASWAG, HELLASWAG

METRICS = {"acc": "", "acc_norm": "_norm"}  # each with the suffix of the predictions behind it
GROUPS = {"activity": ("activity_label",), "split": ("split_type", "split")}  # --by: fields, the first counts


def field(example, names):
    """The first of these fields that an example has as text, or None."""
    return next((example[name] for name in names if isinstance(example.get(name), str)), None)


def hits(examples, result, metric):
    predictions = result[f"predictions{METRICS[metric]}"]
    return [choice == example["label"] for choice, example in zip(predictions, examples)]


def figures(examples, result, indices=None):
    """n, acc, acc_norm and their standard errors, of all examples or of those with these indices: a dict."""
    indices = range(len(examples)) if indices is None else indices
    values = {"n": len(indices)}
    for metric in METRICS:
        hit = hits(examples, result, metric)
        p = values[metric] = sum(hit[i] for i in indices) / len(indices)
        # as lm-evaluation-harness has it
        values[f"{metric}_stderr"] = (p * (1 - p) / max(1, len(indices) - 1)) ** 0.5
    return values


def figures_by(examples, result, by):
    """`figures` of each group of examples, the largest group first: {group: dict}. by: a key of GROUPS."""
    groups = {}
    for index, example in enumerate(examples):
        groups.setdefault(field(example, GROUPS[by]), []).append(index)
    groups = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {group: figures(examples, result, indices) for group, indices in groups}


def mcnemar(only_a, only_b):
    """Two-sided p of the exact McNemar test, from the counts of examples that only A and only B got right.

    It is how often a fair coin, thrown once for each of these examples, falls at least as unevenly.
    """
    n = only_a + only_b
    ways = tail = 1  # of n choose 0, of n choose at most 0
    for k in range(min(only_a, only_b)):
        ways = ways * (n - k) // (k + 1)  # n choose k + 1
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def compare(examples, a, b):
    """Two results on the same examples, A and B: {"acc": dict, "acc_norm": dict}.

    Each holds the difference (B - A), p as of `mcnemar`, and the indices of the examples that only A
    (only_a) and only B (only_b) got right.
    """
    comparison = {}
    for metric in METRICS:
        pairs = list(enumerate(zip(hits(examples, a, metric), hits(examples, b, metric))))
        only_a = [i for i, pair in pairs if pair == (True, False)]
        only_b = [i for i, pair in pairs if pair == (False, True)]
        comparison[metric] = dict(difference=b[metric] - a[metric], p=mcnemar(len(only_a), len(only_b)),
                                  only_a=only_a, only_b=only_b)
    return comparison


def differing(comparison):
    """The indices of the examples that only one of two models got right by acc_norm."""
    return sorted(comparison["acc_norm"]["only_a"] + comparison["acc_norm"]["only_b"])


def titles(results):
    return ", ".join(f"{result['model']} ({result['protocol']})" for result in results)


def print_table(rows):
    """Rows of as many strings each, the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *cells in rows:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    print()


def print_examples(examples, indices, results):
    """The examples with these indices: context and endings, with the scores of each result."""
    print(f"log-likelihoods by {titles(results)}:")
    print("summed, and per token (completion) or character (harness); > the choice, * the right ending\n")
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
    """The results' "groups", of `figures_by`: the largest, for the figures of a few examples say little."""
    sizes = {group: values["n"] for group, values in results[0]["groups"].items()}
    rows = [[by, "n", *(metric for _ in results for metric in METRICS)]]
    for group in list(sizes)[:most]:
        accuracies = [f"{result['groups'][group][metric]:.4f}" for result in results for metric in METRICS]
        rows.append([group, str(sizes[group]), *accuracies])
    print(f"by {by}, {titles(results)}:")
    print_table(rows)
    if len(sizes) > most:
        smaller = list(sizes.values())[most:]
        print(f"smaller groups, of at most {smaller[0]} examples: {len(smaller)} more, which --json holds\n")


def print_published(results, whole):
    """The results' figures among the published ones, which are of all `whole` validation examples."""
    protocols = list(dict.fromkeys(result["protocol"] for result in results))
    rows = {}
    for result in results:
        rows.setdefault(result["model"], []).extend(result[metric] for metric in METRICS)
    for model, published in HELLASWAG.items():
        rows[f"{model}, published"] = [value for protocol in protocols for value in published[protocol]]
    print_table([["", *(f"{protocol} {metric}" for protocol in protocols for metric in METRICS)],
                 *([model, *("-" if value is None else f"{value:.4f}" for value in values)]
                   for model, values in rows.items())])
    if results[0]["n"] != whole:
        print(f"published: of all {whole:,} validation examples; here: of {results[0]['n']:,}")
    print("GPT-3 by its paper's own protocol, 125M, 350M, 760M and 1.3B:",
          ", ".join(f"{value:.3f}" for value in GPT3_HELLASWAG.values()), end="\n\n")


def print_result(result):
    cut = f", {result['endings_cut']} endings cut to its context" if result["endings_cut"] else ""
    print(f"{titles([result])}: HellaSwag acc {result['acc']:.4f} ± {result['acc_stderr']:.4f}, "
          f"acc_norm {result['acc_norm']:.4f} ± {result['acc_norm_stderr']:.4f} "
          f"on {result['n']} examples{cut}")


def print_comparison(comparison, protocol):
    for metric, values in comparison.items():
        print(f"B - A ({protocol}): {metric} {values['difference']:+.4f}, exact McNemar p {values['p']:.3g}, "
              f"right only by A {len(values['only_a'])}, only by B {len(values['only_b'])}")
    indices = " ".join(map(str, differing(comparison))) or "none"
    print(textwrap.shorten(f"right by one only, acc_norm: {indices}", 110, placeholder=" ..."))
