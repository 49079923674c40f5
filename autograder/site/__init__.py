"""The course as a place to read: `make site` makes pages of course/ and of what `make run` executed.

It runs in an environment of its own (.venv-site, from requirements-site.lock), without PyTorch, nbgrader or Jupyter,
so a module here imports nothing of `autograder` that needs those.
"""
