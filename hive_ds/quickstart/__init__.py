"""The quickstart: the whole main job at toy size, from drawing pictures to a page with results."""
