"""Text and HTML from autograder/templates."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def load_templates() -> Environment:
    """The one environment. What a template's ending says is escaped: .html.j2 is HTML, .md.j2 is not."""
    environment = Environment(
        loader=PackageLoader("autograder", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda points: f"{points:g}"
    return environment


def render(template: str, **values) -> str:
    return load_templates().get_template(template).render(**values)


def read_template(name: str) -> str:
    """A template's own text."""
    return load_templates().loader.get_source(load_templates(), name)[0]
