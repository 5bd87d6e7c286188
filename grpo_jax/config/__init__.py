"""What a user says: the records of the YAML file."""
