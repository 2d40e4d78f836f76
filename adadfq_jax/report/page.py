"""Self-contained HTML pages, without network access and without scripts."""

import functools
from typing import Any

from adadfq_jax.runtime import extras


@functools.cache
def _templates() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise extras.missing("a report", "jinja2", "report") from error
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,  # texts in a page come from files and from users
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """Render one of the templates beside this module; every text in it is escaped."""
    return _templates().get_template(template).render(values)


def part(name: str, *values: Any) -> Any:
    """Render a macro of parts.html as markup, which a template inserts as it is."""
    return getattr(_templates().get_template("parts.html").module, name)(*values)
