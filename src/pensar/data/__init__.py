"""From anyone's files to token shards: reading, judging, labelling and mixing documents."""
