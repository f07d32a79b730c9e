// @ts-check
/** Tabs, by the pattern of the ARIA Authoring Practices Guide: arrow keys move between them. */

import {byId} from "./dom.js";

/**
 * Show one panel at a time. A tab's `aria-controls` has the id of its panel.
 *
 * @param {string} id of the list of tabs
 * @param {(panel: string) => void} onShow called with the id of a panel when it is shown
 * @returns {(panel: string) => void} shows a panel
 */
export function tabsOf(id, onShow) {
  const tabs = /** @type {HTMLElement[]} */ ([...byId(id).children]);
  const panelOf = (/** @type {HTMLElement} */ tab) => tab.getAttribute("aria-controls") ?? "";
  /** @param {string} panel */
  const show = (panel) => {
    for (const tab of tabs) {
      const isShown = panelOf(tab) === panel;
      tab.setAttribute("aria-selected", String(isShown));
      tab.tabIndex = isShown ? 0 : -1;
      byId(panelOf(tab)).hidden = !isShown;
    }
    onShow(panel);
  };
  for (const [at, tab] of tabs.entries()) {
    tab.addEventListener("click", () => show(panelOf(tab)));
    tab.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const [before, after] = [at ? at - 1 : last, at < last ? at + 1 : 0];
      const next = {ArrowLeft: before, ArrowRight: after, Home: 0, End: last}[event.key];
      if (next === undefined) return;
      event.preventDefault();
      tabs[next].focus();
      show(panelOf(tabs[next]));
    });
  }
  return show;
}
