"""The reference of the command line, from its parser."""

from __future__ import annotations

import argparse
import os

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from jax_lnfold.cli import commands


class CommandLine(SphinxDirective):
    """A section for each command: what it does, how it is called, its options, its long help."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        os.environ["COLUMNS"] = "88"  # of usages
        parser, self._told = commands.make_parser(), {}
        (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        words = {action.dest: action.help for action in subparsers._choices_actions}
        return [self._section(n, words[n] or "", p) for n, p in subparsers.choices.items()]

    def _section(self, name: str, words: str, parser: argparse.ArgumentParser) -> nodes.section:
        section = nodes.section(ids=[f"command-{name}"], names=[f"command-{name}"])
        section += nodes.title("", "", nodes.literal(text=name))
        section += nodes.paragraph(text=f"{words[:1].upper()}{words[1:]}.")
        section += _literal(parser.format_usage().removeprefix("usage: "))
        options = nodes.definition_list()
        for action in parser._actions[1:]:  # without --help
            options += _option(action, parser.formatter_class(parser.prog))
        section += options
        _, _, text = (parser.description or "").partition("\n\n")
        before = self._told.setdefault(text, name)
        alike = nodes.paragraph(text=f"TARGET is as for {before}.")
        section += _literal(text) if before == name else alike
        return section


def _option(action: argparse.Action, formatter: argparse.HelpFormatter) -> nodes.Node:
    term = nodes.term("", "", nodes.literal(text=formatter._format_action_invocation(action)))
    text = formatter._expand_help(action) if action.help else ""
    return nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=text)))


def _literal(text: str) -> nodes.literal_block:
    return nodes.literal_block(text.strip(), text.strip(), language="text")


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive ``command-line``."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
