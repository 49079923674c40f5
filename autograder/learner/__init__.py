"""The learner's side: their copies of the lessons, how far they are, and what they hand in.

    work/index.ipynb, work/notation.ipynb      the roadmap with their progress
    work/<stage>/<lesson>.ipynb                their copies: all that they write
    work/.earlier/<stage>/<lesson>.<time>.ipynb  a copy from before a new lesson was merged into it
    work/.course/<stage>/<lesson>.ipynb        the lesson that a copy was last made from
    work/.progress.json                        what `check` found last
    work/<student>.zip                         the archive to hand in

`python -m autograder.learner` has the commands, also in the learners' edition, where nothing else of autograder is.
"""
