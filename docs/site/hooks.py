"""What `mkdocs build` adds to the pages in docs/: pages that are made from the code, the yamls and other files.

mkdocs calls `on_config` and `on_files` once, and `on_page_markdown` for every page. What is made here is not kept in
the repository. So it cannot go out of date.
"""

import re
from pathlib import Path
from typing import Any

import graph  # the file beside this one
import yaml

from pai_bench.config import schema, signatures
from pai_bench.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
PACKAGE = ROOT / "pai_bench"
# Files beside docs/ that are pages of the site, and those that are no Markdown.
OTHERS = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
TEXTS = {"LICENSE": "license.md", "CITATION.cff": "citation.md"}
# Sections that are pages of their own on the site: file, heading, page.
SECTIONS = (
    ("configuration.md", "Every setting", "settings.md"),
    ("results.md", "The row", "columns.md"),
    ("methods.md", "A mask from elsewhere", "masks.md"),
    ("cluster.md", "Exit codes", "exit-codes.md"),
)
# Groups that come first; the others follow.
FIRST = ("model", "dataset", "training", "pruner", "allocation", "schedule", "search", "ablation", "rewire", "transfer")
# The rooms of the package whose functions a user may call, and what to read there first.
ROOMS = (
    "api", "core", "errors", "masks", "pruners", "learned", "pruning", "rewiring", "analysis", "models", "training",
    "runs", "report",
)  # fmt: skip
RANK = "---\nsearch:\n  boost: 0.2\n---\n"  # in a search these pages come after those that people wrote
PROBES = (object(), -(2**40), -1e30)  # values that no setting with a range takes


def on_config(config: Any) -> Any:
    """Puts a page for each room of the package under "API"."""
    for part in config.nav:
        for entry in next(iter(part.values())) if isinstance(next(iter(part.values())), list) else []:
            if "API" in entry:
                entry["API"] += [{Path(name).stem: name} for name in api() if "/" in name]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made. mkdocs hands in the files of docs/."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):  # to download
        files.append(File.generated(config, f"notebooks/{notebook.name}", content=notebook.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page for the site. Sections with a page of their own become a link to it."""
    for source, heading, target in SECTIONS:
        if page.file.src_uri == source:
            before, _, after = parted(markdown, heading)
            markdown = f"{before}## {heading}\n\nOn a page of its own: [{heading}]({target}).\n\n{after}"
    return with_pictures(with_titles(to_sections(out_of_docs(markdown), page.file.src_uri)))


def pages() -> dict[str, str]:
    """Every page that is made, by its file name."""
    made = {target: (ROOT / source).read_text() for source, target in OTHERS.items()}
    made["index.md"] = re.sub(r"^\[?!\[[^\]]*\]\(https://img.*\n|^\[!\[CI.*\n", "", made["index.md"], flags=re.M)
    made = {name: re.sub(r"\]\(docs/", "](", text) for name, text in made.items()}
    for source, target in TEXTS.items():
        made[target] = f"# {Path(target).stem.capitalize()}\n\n{indented((ROOT / source).read_text())}"
    for source, heading, target in SECTIONS:
        _, section, _ = parted((ROOT / "docs" / source).read_text(), heading)
        made[target] = f"# {heading}\n\n{re.sub('^###', '##', section, flags=re.M)}"
    made["settings.md"] = with_values(made["settings.md"])
    made["options.md"] = options()
    return made | api()


def parted(text: str, heading: str) -> tuple[str, str, str]:
    """A page before a section, the section without its heading, and the page after it."""
    before, _, rest = text.partition(f"\n## {heading}\n")
    if not rest:
        raise ConfigError(f"no section {heading!r}; SECTIONS in docs/site/hooks.py names it")
    section, mark, after = rest.partition("\n## ")
    return f"{before}\n", section.strip() + "\n", mark.lstrip("\n") + after


def out_of_docs(text: str) -> str:
    """Links to files beside docs/ lead to the pages that are made of them."""
    for source, target in (*OTHERS.items(), *TEXTS.items()):
        text = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}", f"]({target}", text)
    return text.replace("](../notebooks/", "](notebooks/")


def to_sections(text: str, page: str) -> str:
    """Links to places in a section that is a page of its own lead to that page."""
    for source, heading, target in SECTIONS:
        _, section, _ = parted((ROOT / "docs" / source).read_text(), heading)
        for inner in re.findall(r"^###+ (.*)", section, re.M):
            place = re.sub(r"[^\w -]", "", inner).lower().replace(" ", "-")
            text = text.replace(f"]({source}#{place})", f"]({target}#{place})")
            if page in (source, target):
                text = text.replace(f"](#{place})", f"]({target}#{place})")
        text = text.replace(f"]({source}#{heading.lower().replace(' ', '-')})", f"]({target})")
    return text


def with_titles(text: str) -> str:
    """Links whose text is the name of a file have the title of the page instead."""

    def title(found: re.Match[str]) -> str:
        path = next((path for path in (ROOT / "docs" / found[1], ROOT / found[1]) if path.exists()), None)
        return f"[{path.read_text().partition(chr(10))[0].removeprefix('# ')}](" if path else found[0]

    return re.sub(r"\[`?([-\w]+\.md)`?\]\(", title, text)


def with_pictures(text: str) -> str:
    """Graphs written in Mermaid are drawn here: its script would come from a network."""

    def picture(found: re.Match[str]) -> str:
        return f'<div class="graph">\n{graph.svg(found[1], "What each arrow leads to")}\n</div>'

    return re.sub(r"^```mermaid\n(.*?)^```$", picture, text, flags=re.M | re.S)


def indented(text: str) -> str:
    """A text as a block of code."""
    return "".join(f"    {line}\n" for line in text.splitlines())


# Every setting, with the values that it takes -------------------------------------------------------------------------


def with_values(page: str) -> str:
    """The tables of settings with a column more: what the code takes."""
    lines = []
    for line in page.splitlines():
        if line.startswith("| `"):
            first, rest = re.split(r"(?<!\\)\|", line, maxsplit=2)[1:]
            found = dict.fromkeys(takes(key) for key in re.findall(r"`([\w./]+)`", first))
            line = f"|{first}| {'; '.join(filter(None, found))} |{rest}"
        elif line.startswith("| ---"):
            line = line.replace("| --- |", "| --- | --- |", 1)
        elif line.startswith("| setting |"):
            line = line.replace("| setting |", "| setting | takes |", 1)
        lines.append(line)
    return "\n".join(lines) + "\n"


def takes(key: str) -> str:
    """The values that a setting takes, in words: its type and its range, as the annotation in the code has them."""
    if options_of := sorted(path.stem for path in (CONF / key).glob("*.yaml")) if key not in ("", ".") else []:
        return ", ".join(f"`{option}`" for option in options_of)
    found = [[schema.wanted(key, probe) for probe in PROBES]]
    if not any(found[0]):
        group, _, name = key.rpartition(".")
        found = arguments(group.replace(".", "/"), name)
    return "; ".join(filter(None, dict.fromkeys(map(in_words, found))))


def in_words(wanted: list[str | None]) -> str:
    """What to give, from the answers to several wrong values: the type, then the range, then null."""
    parts = [part for said in wanted if said for part in (said.split(" or ") if "or more" not in said else [said])]
    parts = list(dict.fromkeys(part.removesuffix(" or null").removeprefix("one of ") for part in parts))
    ranges = [part.removeprefix("one ") for part in parts if part.startswith("one in ") or part.endswith("or more")]
    kinds = [part for part in parts if part != "null" and part.removeprefix("one ") not in ranges]
    null = ["or null"] if any(said and said.endswith("null") for said in wanted) else []
    return " ".join([", ".join(filter(None, [" or ".join(kinds), *ranges])), *null])


def arguments(group: str, name: str) -> list[list[str | None]]:
    """What the functions of a group want for an argument."""
    found = []
    for path in sorted((CONF / group).glob("*.yaml")) if group else []:
        target = (yaml.safe_load(path.read_text()) or {}).get("_target_")
        setting = signatures.settings_of(target).get(name) if target else None
        if setting:
            found.append([signatures.problem(probe, setting.annotation, setting.module) for probe in PROBES])
    return found


# Every option of every group ------------------------------------------------------------------------------------------


def groups() -> list[str]:
    """The groups of `conf/` with options, those that people choose first. Experiments have a page of their own."""
    found = {path.parent.relative_to(CONF).as_posix() for path in CONF.glob("*/**/*.yaml")} - {"experiment"}
    return sorted(
        found, key=lambda group: (FIRST.index(first) if (first := group.split("/")[0]) in FIRST else 99, group)
    )


def options() -> str:
    """The page with the yaml of every option."""
    lines = [
        "# Every option",
        "Each option of a group is a yaml file. This page shows all of them as they are in `conf/`. "
        "`pai-bench GROUP=OPTION` chooses one, and any value in it can be set: [configuration](configuration.md). "
        "The experiments are on a page of their own: [published results](reproducing.md).",
    ]
    for group in groups():
        lines.append(f"## {group}=")
        for path in sorted((CONF / group).glob("*.yaml")):
            lines += [f"### {path.stem}", f"```yaml\n{path.read_text().rstrip()}\n```"]
    return "\n\n".join(lines) + "\n"


# The API --------------------------------------------------------------------------------------------------------------


def api() -> dict[str, str]:
    """A page for each room of the package, made from its docstrings, and a page that lists them."""
    made, rows = {}, []
    for room in ROOMS:
        files = sorted((PACKAGE / room).glob("[a-z]*.py")) or [PACKAGE / f"{room}.py"]
        names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.exists()]
        if names:
            made[f"api/{room}.md"] = f"{RANK}# {room}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"
            rows.append(f"| [{room}](api/{room}.md) | {', '.join(f'`{name}`' for name in names)} |")
    text = (
        "# API\n\nEvery public function of these parts of the package, from its docstring. "
        "[Architecture](architecture.md) says what each part is for.\n\n| part | modules |\n| --- | --- |\n"
    )
    return made | {"api.md": text + "\n".join(rows) + "\n"}
