"""Builds, runs and grades the course: solutions → course, course → report, class → gradebook."""
