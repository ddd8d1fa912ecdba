"""A plan on other trees than the one it was made for: boxes around leaves, parts of ensembles."""

from __future__ import annotations

from jax_lnfold.trees import alike_paths


def test_key_paths_are_alike_with_boxes_and_without() -> None:
    assert alike_paths(["a/w"], ["a/w", "b/w"]) == {"a/w": ["a/w"]}
    assert alike_paths(["a/w/value", "b"], ["a/w", "b/value"]) == {
        "a/w/value": ["a/w"],
        "b": ["b/value"],
    }
    assert alike_paths(["a/value/w"], ["a/w", "value/a/w"]) == {"a/value/w": []}, "only at the end"
    query = ["query", "value"]
    assert alike_paths(query, ["query/value", "value/value"]) == {
        "query": ["query/value"],
        "value": ["value/value"],
    }
    assert alike_paths(["q", "q/value"], ["q"]) == {"q": ["q"], "q/value": []}, "it is taken"


def test_key_paths_are_alike_in_other_spellings() -> None:
    def slashes(name: str) -> str:
        return name.replace(".", "/")

    assert alike_paths(["a/w"], ["a.w", "a/w"], slashes) == {"a/w": ["a/w"]}, "the very name first"
    assert alike_paths(["a/b/w"], ["a.b/w", "a/b.w"], slashes) == {"a/b/w": ["a.b/w", "a/b.w"]}
