"""What the verbs of the command line do, one file per verb that does more than call."""
