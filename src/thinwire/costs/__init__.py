"""What a run's costs are made of: frames that are not sent, memory that is not used, constants that were fitted."""
