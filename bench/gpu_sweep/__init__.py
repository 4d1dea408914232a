"""All that is to be measured on a GPU that is at hand for minutes; see __main__."""
