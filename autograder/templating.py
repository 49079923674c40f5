"""Text and HTML from autograder/templates."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def load_templates() -> Environment:
    """The one environment. What a template's ending says is escaped: .html.j2 is HTML, .md.j2 is not."""
    return Environment(
        loader=PackageLoader("autograder", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values) -> str:
    return load_templates().get_template(template).render(**values)
