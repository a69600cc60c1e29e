"""A miniature world for the demo: text skills, a small base pretrained here, and four ways to teach it a new one."""
