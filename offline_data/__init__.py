"""What offline.py learns from: one file per kind of data, none of which knows how it is learned from.

transitions.py holds what they yield in memory. runs.py and tdmpc2.py each define a class with
    tasks, transitions      what it holds of the tasks that were asked for
    rows, nbytes            the observations to make room for; bytes of memory taken while it is read
    action_repeat           steps for which each action was taken
    read()                  yields offline_data.episodes.Episodes
"""
