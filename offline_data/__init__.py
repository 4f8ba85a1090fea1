"""What offline.py learns from: one file per kind of data, none of which knows how it is learned from.

transitions.py holds what they yield in memory. runs.py and tdmpc2.py each define a class with
    tasks, transitions      what it holds of the tasks that were asked for, and how many transitions of each
    rows                    the observations to make room for
    block, nbytes           the most transitions it yields at once; bytes of memory it takes meanwhile, these included
    action_repeat           steps for which each action was taken
    read(own)               yields offline_data.episodes.Episodes; own: the sizes O and A of each task itself
"""
