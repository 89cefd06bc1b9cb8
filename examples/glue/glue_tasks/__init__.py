"""GLUE and SuperGLUE as tasks with answers that can be checked: files, prompts, labels, metrics.

Nothing here is downloaded: the files are those that gluebenchmark.com and super.gluebenchmark.com
hand out, in folders of their names. `task` says how a file becomes prompts with answers, `glue` and
`superglue` list the tasks, `answers` reads responses, and `metrics` and `scores` judge them.
"""
