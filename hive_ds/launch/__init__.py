"""Starting ranks on hosts: what the scripts in ``slurm/`` and ``hive-ds hosts`` call."""
