"""Builds, runs and grades the course: solutions → course, course → report, class → gradebook."""

import sys

# jsonschema, which nbformat imports, would make a parser for URIs of this package, for a second: notebooks have none.
sys.modules.setdefault("rfc3987_syntax", None)
