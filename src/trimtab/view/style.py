"""Looks of the page; colours come from Gradio's theme, which has a dark and a light side."""

CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.tt-notice, .tt-missing, .tt-panel, .tt-status { overflow-wrap: anywhere; }
.tt-notice { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 8px 12px; }
.tt-alert { border-left: 4px solid #c2410c; }
.tt-panels { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.tt-panels:not(:has(> :nth-child(3))) { max-width: 820px; }
.tt-panels:not(:has(> :nth-child(2))) { max-width: 400px; }
.prose .tt-panel h2 { margin: 0; font-size: 1.05em; }
.tt-share { margin: 0 0 6px; }
.prose .tt-picture { display: block; width: 100%; margin: 0 0 8px; border-radius: 4px; image-rendering: pixelated; }
.tt-legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0; }
.tt-scale { display: flex; gap: 8px; align-items: center; }
.prose .tt-scale img { width: 160px; height: 14px; margin: 0; border-radius: 3px; image-rendering: pixelated; }
.tt-scroll { overflow-x: auto; contain: inline-size; }
.tt-scroll:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
.gradio-container :focus-visible { outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
.gradio-container summary:focus-visible { outline-offset: -2px; }
.prose .tt-scroll table { width: 100%; border-collapse: collapse; }
.prose .tt-scroll :is(table, thead, tbody, tr) { border: 0 !important; }
.prose .tt-name { margin: 8px 0 0; }
.prose .tt-scroll :is(th, td) { padding: 4px 10px 4px 0; text-align: left; white-space: nowrap; }
.prose .tt-scroll :is(th, td) { border: 0 solid var(--border-color-primary) !important; }
.prose .tt-scroll tr :is(th, td) { border-bottom-width: 1px !important; }
.prose .tt-scroll td.tt-answer { white-space: pre-wrap; min-width: 12em; overflow-wrap: anywhere; }
:root { --block-info-text-color: var(--neutral-600) !important; }
.dark { --block-info-text-color: var(--neutral-300) !important; }
.gradio-container .min_value, .gradio-container .max_value { color: var(--block-info-text-color); }
footer { display: none !important; }
"""
