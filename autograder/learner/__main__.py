from autograder.learner.cli import app

app()
