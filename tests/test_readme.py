"""What the README tells people to type exists: make targets, commands and their options, Python that parses."""

import re
import shlex
from pathlib import Path

import click
import pytest

from dit2deploy.cli import group

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
SHELL = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def commands(program: str) -> list[list[str]]:
    found = [line[1:] for line in SHELL if line[0] == program]
    assert found, f"the README shows no {program} command"
    return found


@pytest.mark.parametrize("words", commands("dit2deploy"), ids=" ".join)
def test_commands_are_understood(words: list[str]):
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, f"there is no command {words[0]}"
    parameters = {option: parameter for parameter in command.params for option in parameter.opts}
    options = [word for word in words[1:] if word.startswith("-")]
    assert set(options) <= set(parameters), f"{words[0]} has no {set(options) - set(parameters)}"
    values = sum(not getattr(parameters[option], "is_flag", False) for option in options)
    arguments = sum(isinstance(parameter, click.Argument) for parameter in command.params)
    assert len(words) - 1 - len(options) - values <= arguments


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_make_knows_its_targets(words: list[str]):
    assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()


def test_continuous_integration_runs_the_test_command():
    assert ["make", "test"] in SHELL
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_parses(block: str):
    compile(block, "README.md", "exec")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^):#]+)\)", README))
def test_links_lead_somewhere(link: str):
    assert (ROOT / link).exists()
