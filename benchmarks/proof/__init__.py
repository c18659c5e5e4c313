"""Does self-critique work? One command chooses a setting, measures the critic, and trains with it and without.

    choice  settings of a declared grid, on the validation world; a declared rule takes one of them
    critic  its verdicts against a judge that cannot err, on prompts of test scenes, in both layouts
    test    the chosen setting on the test world, over seeds: the critic's preferences and those of the controls

Every arm is a run of the very pipeline, submitted as a job; running the command again goes on where it stopped.
"""
